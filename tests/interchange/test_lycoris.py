"""Files of LyCORIS, with the library itself as the other side, and kohya's OFT, GLoRA's early form, refusals."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from ldm.errors import InputError
from ldm.interchange import identify, kinds, load_any, lycoris
from ldm.interchange.formats import Context, by_name, open_file
from ldm.interchange.inspection import describe
from ldm.interchange.lora import delta
from tests import interchange_models
from tests.helpers import assert_close_to

torch.set_num_threads(1)

BLOCK = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0"
LINEAR = (f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.0.proj")
CONVOLUTIONS = ("model.diffusion_model.input_blocks.2.0.in_layers.2", "model.diffusion_model.input_blocks.1.1.proj_in")
TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj"
NORMS = ("model.diffusion_model.input_blocks.2.0.in_layers.0", f"{BLOCK}.norm2")


@pytest.fixture(scope="module")
def small(config):
    return interchange_models.small_model(config)


@pytest.fixture
def model(small):
    """The model; a test leaves it as it was."""
    state = {name: value.data for name, value in small.state_dict(keep_vars=True).items()}
    yield small
    restore(small, state)


def restore(model, state):
    for name, value in model.state_dict(keep_vars=True).items():
        value.data = state[name]
    model.tuning.released = {}


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed: pip install .[test]")


def layer_of(model, name):
    """A layer by its released name; transformers 5 has no level `text_model`."""
    part = name if hasattr(model.cond_stage_model.transformer, "text_model") else name.replace("text_model.", "")
    return model.get_submodule(part)


def attached(model, kind, layers, settings, multiplier=1.0, seed=3):
    """Copies of layers with LyCORIS's modules of random values around them, and the tensors that LyCORIS saves."""
    layers = {name: layer_of(model, name) for name in layers}
    return attached_to(layers, lycoris.names_of(model), kind, settings, multiplier, seed)


def attached_to(layers, names, kind, settings, multiplier=1.0, seed=3):
    """The same for given layers by our names, and kohya's names of them."""
    tensors, copies = {}, {}
    for number, (name, layer) in enumerate(layers.items()):
        copies[name] = copy.deepcopy(layer)
        module = kind(names[name], copies[name], multiplier, **settings)
        generator = torch.Generator().manual_seed(seed + number)
        for own, value in module.named_parameters():
            start = value.data if own in ("dora_scale", "rescale") else 0
            value.data = start + 0.3 * torch.randn(value.shape, generator=generator)
        module.eval().requires_grad_(False)
        module.apply_to()
        tensors |= {f"{names[name]}.{key}": value.detach().clone() for key, value in module.state_dict().items()}
    return copies, tensors


RANK = {"lora_dim": 3, "alpha": 2.0}
TUCKER = {**RANK, "use_tucker": True}
CASES = {
    "locon": ("LoConModule", RANK),
    "locon-tucker": ("LoConModule", TUCKER),
    "locon-rs": ("LoConModule", {**RANK, "rs_lora": True}),
    "locon-scalar": ("LoConModule", {**RANK, "use_scalar": True}),
    "dora": ("LoConModule", {**RANK, "weight_decompose": True}),
    "dora-on-inputs": ("LoConModule", {**RANK, "weight_decompose": True, "wd_on_out": False}),
    "loha": ("LohaModule", RANK),
    "loha-tucker": ("LohaModule", TUCKER),
    "doha": ("LohaModule", {**RANK, "weight_decompose": True}),
    "lokr": ("LokrModule", {"lora_dim": 1, "alpha": 0.5, "factor": 2}),
    "lokr-whole": ("LokrModule", {"full_matrix": True, "lora_dim": 2}),
    "lokr-both": ("LokrModule", {"lora_dim": 1, "alpha": 2.0, "decompose_both": True, "factor": 4}),
    "lokr-tucker": ("LokrModule", {**TUCKER, "lora_dim": 1, "factor": 2}),
    "dokr": ("LokrModule", {"lora_dim": 1, "factor": 2, "weight_decompose": True}),
    "glora": ("GLoRAModule", RANK),
    "ia3": ("IA3Module", {}),
    "ia3-on-inputs": ("IA3Module", {"train_on_input": True}),
    "oft": ("DiagOFTModule", {"lora_dim": 4}),
    "oft-limit": ("DiagOFTModule", {"lora_dim": 4, "constraint": 0.01}),
    "oft-rescaled": ("DiagOFTModule", {"lora_dim": 4, "rescaled": True}),
    "boft": ("ButterflyOFTModule", {"lora_dim": 4}),
    "boft-rescaled": ("ButterflyOFTModule", {"lora_dim": 4, "rescaled": True, "constraint": 0.02}),
    "full": ("FullModule", {}),
    "norms": ("NormModule", {}),
}
# where LyCORIS has a strength of its own, ours differs on purpose: see docs/formats.md
ONE_STRENGTH = ("dora", "dora-on-inputs", "doha", "dokr", "oft-rescaled", "boft-rescaled")


def layers_for(case):
    if case == "norms":
        return NORMS
    return (*LINEAR, *CONVOLUTIONS, *(() if case.startswith("boft") else (TEXT,)))  # 24 is no power of two times two


@torch.no_grad()
def outputs(layers, through=None):
    """What each layer answers to a fixed random input; `through`: other layers that get the same inputs."""
    found = {}
    for number, (name, layer) in enumerate(layers.items()):
        generator = torch.Generator().manual_seed(number)
        kind = type(layer).__name__
        width = {"Linear": "in_features", "Conv2d": "in_channels", "LayerNorm": "normalized_shape"}
        width = getattr(layer, width.get(kind, "num_channels"))
        width = width[0] if isinstance(width, tuple) else width
        picture = isinstance(layer, (torch.nn.Conv2d, torch.nn.GroupNorm))
        layer = through[name] if through else layer
        found[name] = layer(torch.randn((2, width, 6, 6) if picture else (2, 5, width), generator=generator))
    return found


@pytest.mark.parametrize("case", CASES)
def test_we_act_as_lycoris_does(library, model, tmp_path, case):
    """Their forward pass, with their modules around the layers, against ours with the file loaded."""
    kind, settings = CASES[case]
    state = {name: value.data for name, value in model.state_dict(keep_vars=True).items()}
    layers = {name: layer_of(model, name) for name in layers_for(case)}
    plain = outputs(layers)
    for strength in (1.0,) if case in ONE_STRENGTH else (1.0, 0.6):
        copies, tensors = attached(model, getattr(library, kind), layers, settings, strength)
        expected = outputs(copies)
        save_file(tensors, tmp_path / "x.safetensors")
        plain_lora = case in ("locon", "locon-rs", "locon-scalar")
        assert identify(tmp_path / "x.safetensors") == ("kohya" if plain_lora else "lycoris")
        load_any(model, tmp_path / "x.safetensors", strength)
        for name, found in outputs(layers).items():
            assert (expected[name] - plain[name]).norm() > 0.002 * plain[name].norm(), name
            assert_close_to(found, expected[name], 1e-5)
        restore(model, state)


def test_dora_at_a_strength(library, model, tmp_path):
    """DoRA goes linearly from the weight to the changed one, as ComfyUI and web UIs have it; LyCORIS scales norms."""
    name = LINEAR[0]
    copies, tensors = attached(model, library.LoConModule, [name], {**RANK, "weight_decompose": True})
    save_file(tensors, tmp_path / "x")
    layer = layer_of(model, name)
    before = outputs({name: layer})[name]
    load_any(model, tmp_path / "x", 0.25)
    assert_close_to(outputs({name: layer})[name], before + 0.25 * (outputs(copies)[name] - before), 1e-5)


def kohya_oft(weight, blocks, alpha):
    """The weight as sd-scripts' networks/oft.py rotates it, written out with whole matrices."""
    skew = blocks - blocks.transpose(1, 2)
    norm = skew.flatten().norm()
    skew = skew * (min(norm, alpha * len(weight)) + 1e-8) / (norm + 1e-8)
    one = torch.eye(blocks.shape[1])
    rotations = [(one + block) @ torch.inverse(one - block) for block in skew]
    return (torch.block_diag(*rotations).T @ weight.flatten(1)).reshape(weight.shape)


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 0.0])
def test_oft_of_kohya(model, tmp_path, alpha):
    tensors, expected = {}, {}
    for number, name in enumerate((*LINEAR, *CONVOLUTIONS)):
        weight, stem = layer_of(model, name).weight.data, lycoris.names_of(model)[name].replace("lora_", "oft_", 1)
        size = len(weight) // 4
        blocks = 0.2 * torch.randn(4, size, size, generator=torch.Generator().manual_seed(number))
        tensors |= {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(alpha)}
        expected[name] = weight + 0.7 * (kohya_oft(weight, blocks, alpha) - weight)
    save_file(tensors, tmp_path / "x")
    assert identify(tmp_path / "x") == "lycoris" and describe(tmp_path / "x")["kinds"] == ["oft"]
    state = {name: value.data for name, value in model.state_dict(keep_vars=True).items()}
    row, context = by_name("lycoris"), Context(model, source="x")
    row.write(tmp_path / "y", row.read("kinds", open_file(tmp_path / "x"), context), context)  # as LyCORIS has it
    for file in "xy":
        load_any(model, tmp_path / file, 0.7)
        for name, weight in expected.items():
            assert_close_to(layer_of(model, name).weight, weight, 1e-6)
        restore(model, state)


def test_early_forms(model, tmp_path):
    """GLoRA with its pairs the other way round, rotations as such, and a scalar that is not yet multiplied in."""
    generator = torch.Generator().manual_seed(0)
    names, (q, k, ff), tensors = lycoris.names_of(model), LINEAR, {}
    weights = {name: layer_of(model, name).weight.data.clone() for name in LINEAR}
    width, out = weights[k].shape[1], len(weights[k])
    shapes = {"a1": (2, width), "a2": (width, 2), "b1": (2, width), "b2": (out, 2)}
    a1, a2, b1, b2 = pairs = [torch.randn(*shape, generator=generator) for shape in shapes.values()]
    tensors |= {f"{names[k]}.{role}.weight": value for role, value in zip(shapes, pairs, strict=True)}
    tensors[f"{names[k]}.alpha"] = torch.tensor(1.0)
    rotations = torch.linalg.qr(torch.randn(8, 4, 4, generator=generator))[0].contiguous()
    tensors[f"{names[q]}.oft_diag"] = rotations
    up, down = torch.randn(len(weights[ff]), 2, generator=generator), torch.randn(2, 32, generator=generator)
    tensors |= {f"{names[ff]}.lora_{role}.weight": value for role, value in (("up", up), ("down", down))}
    tensors[f"{names[ff]}.scalar"] = torch.tensor(0.3)
    save_file(tensors, tmp_path / "x")
    load_any(model, tmp_path / "x")
    assert_close_to(layer_of(model, k).weight, weights[k] + 0.5 * (weights[k] @ a2 @ a1 + b2 @ b1), 1e-5)
    assert_close_to(layer_of(model, q).weight, torch.block_diag(*rotations).T @ weights[q], 1e-5)
    assert_close_to(layer_of(model, ff).weight, weights[ff] + 0.3 * up @ down, 1e-5)


def test_dora_of_diffusers(model, tmp_path):
    """Its spelling: lora_A, lora_B and a vector of magnitudes, with the scale in the metadata."""
    name, stem = LINEAR[0], "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = layer_of(model, name).weight.data.clone()
    a, b, magnitude = torch.randn(2, 32), torch.randn(32, 2), torch.rand(32) + 0.5
    metadata = {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 1, "unet.use_dora": true}'}
    tensors = {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.lora_magnitude_vector": magnitude}
    save_file(tensors, tmp_path / "x", metadata)
    load_any(model, tmp_path / "x")
    changed = weight + 0.5 * b @ a
    assert_close_to(
        layer_of(model, name).weight, magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True), 1e-5
    )


@pytest.mark.parametrize("case", ["locon-tucker", "loha", "lokr-both", "lokr"])
def test_as_plain_lora(library, model, tmp_path, case):
    """What is a sum of products of small factors becomes plain LoRA, exactly."""
    kind, settings = CASES[case]
    layers = layers_for(case) if case != "lokr" else LINEAR[:1]
    _, tensors = attached(model, getattr(library, kind), layers, settings | {"lora_dim": 1})
    save_file(tensors, tmp_path / "x")
    file, context = open_file(tmp_path / "x"), Context(model)
    row = by_name("lycoris")
    plain, whole = row.read("lora", file, context), row.read("kinds", file, context)
    for name, part in whole.layers.items():
        weight = layer_of(model, name).weight
        assert_close_to(delta(plain.layers[name]).reshape(weight.shape), kinds.change(part, weight), 1e-5)


def test_refusals(library, model, tmp_path):
    name = lycoris.names_of(model)[LINEAR[0]]

    def refused(tensors, message):
        save_file(tensors, tmp_path / "x")
        with pytest.raises(InputError, match=message):
            load_any(model, tmp_path / "x")

    loha = {f"{name}.hada_w{i}_{role}": torch.ones(2, 32).reshape(shape)
            for i in (1, 2) for role, shape in (("a", (32, 2)), ("b", (2, 32)))}  # fmt: skip
    refused(loha | {f"{name}.hada_w1_a": torch.ones(5, 2)}, "another base model, or is damaged: .*LoHa of .*5, 2")
    refused(
        {key: value for key, value in loha.items() if "w2_b" not in key},
        "is LoHa without hada_w2_b; the file is damaged",
    )
    refused(loha | {f"{name}.lokr_w1": torch.ones(2, 2)}, "is LoHa, which has no 'lokr_w1'")
    refused(loha | {f"{name}.alpha": torch.tensor(float("nan"))}, "1 of 5 tensors are not finite")
    refused(loha | {f"{name}.strange": torch.ones(1)}, r"1 unknown keys, e.g. .*\.strange;")
    refused({key.replace("lora_unet", "nowhere"): value for key, value in loha.items()}, "unknown keys, e.g. nowhere")
    twice = loha | {key.replace("lora_unet", "lycoris_unet"): value.clone() for key, value in loha.items()}
    refused(twice, "changes .*attn1.to_q twice, under two spellings, e.g. 'l")
    refused({f"{name}.diff_b": torch.ones(7)}, "has no weight .*attn1.to_q.bias; wrong base model")
    # a small file that asks for 40 GB, and vectors of one number, which would fit anything
    shapes = {"a": (10**5, 1), "b": (1, 10**5)}
    large = {f"{name}.hada_w{i}_{role}": torch.ones(shape) for i in (1, 2) for role, shape in shapes.items()}
    refused(large, "another base model, or is damaged: .*LoHa")
    refused({f"{name}.lokr_w{i}": torch.ones(317, 317) for i in (1, 2)}, "another base model, or is damaged: .*LoKr")
    tall = {
        f"{name}.lora_{role}.weight": torch.ones(shape) for role, shape in (("up", (10**5, 1)), ("down", (1, 10**5)))
    }
    refused(tall | {f"{name}.dora_scale": torch.ones(10**5)}, "another base model, or is damaged: .*LoRA")
    rows = {f"{name}.lora_{role}.weight": torch.ones(shape) for role, shape in (("up", (32, 1)), ("down", (1, 32)))}
    refused(rows | {f"{name}.dora_scale": torch.ones(1)}, "another base model, or is damaged: .*LoRA")
    refused({f"{name}.weight": torch.ones(1), f"{name}.on_input": torch.tensor(0)}, "another base model, or is damaged")
    refused({f"{name}.oft_blocks": torch.ones(5, 3, 3)}, "OFT of .*does not fit this model's weight")
    refused({f"{name}.oft_blocks": torch.ones(2, 2)}, r"has \['oft_blocks'\], which no kind of change has")
    refused({f"{name}.dora_scale": torch.ones(32)}, r"has \['dora_scale'\], which no kind of change has")
