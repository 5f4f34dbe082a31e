"""What is trained here as LoHa, LoKr, DoRA, OFT, BOFT, norms or whole weights, as files that LyCORIS and PEFT load."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file

from ldm.commands import Program
from ldm.errors import InputError
from ldm.interchange import diffusers_model, identify, layers, load_any, lycoris
from ldm.interchange.inspection import describe
from ldm.tuning import choose, files
from tests import interchange_models
from tests.helpers import assert_close_to
from tests.interchange.test_lycoris import BLOCK, CONVOLUTIONS, LINEAR, NORMS, TEXT, layer_of, outputs

torch.set_num_threads(1)

LAYERS = [*LINEAR, *CONVOLUTIONS]
SMALL = [*LINEAR, CONVOLUTIONS[1]]  # without the 3 x 3 convolution


@pytest.fixture(scope="module")
def base(config, tmp_path_factory):
    """The base model, its checkpoint, its config as a file, and as a diffusers folder."""
    from omegaconf import OmegaConf

    folder = tmp_path_factory.mktemp("base")
    model = interchange_models.small_model(config)
    interchange_models.save(model, folder / "base.safetensors")
    OmegaConf.save(config, folder / "model.yaml")
    diffusers_model.write_folder(folder / "diffusers", model.state_dict(), config.model.params)
    return model, folder


def tuned(model, folder, *entries, seed=1):
    """A copy of a model with trained-looking families, saved as training does; returns the copy."""
    model = copy.deepcopy(model)
    files.settle(model)
    model.tuning.families = [choose(entry) for entry in entries]
    model.tuning.install()
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.tuning.parameters().items():
        start = (
            0 if ".default" in name and not name.endswith(("boft_s.default", "vector.default.weight")) else value.data
        )
        value.data = start + 0.2 * torch.randn(value.shape, generator=generator)
    model.eval().requires_grad_(False)
    files.save(model, folder)
    return model


def lora(kind, targets=LAYERS, rank=2, **params):
    return {"family": "lora", "params": {"kind": kind, "targets": targets, "rank": rank, **params}}


def convert(source, target, to, folder, *more):
    Program("convert")([str(source), str(target), "--to", to, "--config", str(folder / "model.yaml"), *map(str, more)])
    return target


def answers(model, names, base):
    """What a model's layers answer to inputs that fit those of the base."""
    return outputs({name: layer_of(base, name) for name in names}, {name: layer_of(model, name) for name in names})


def same(found, expected, plain, tolerance=1e-5):
    for name, value in expected.items():
        assert (value - plain[name]).norm() > 0.002 * plain[name].norm(), name
        assert_close_to(found[name], value, tolerance)


def loaded_by_lycoris(library, model, path, names):
    """The layers with the modules around them that LyCORIS makes of a file."""
    theirs, held, copies = lycoris.names_of(model), load_file(path), {}
    for name in names:
        copies[name] = copy.deepcopy(layer_of(model, name))
        kind, tensors = library.get_module(held, theirs[name])
        with torch.no_grad():
            library.make_module(kind, tensors, theirs[name], copies[name]).eval().apply_to()
    return copies


KINDS = {
    "dora": lora("dora", alpha=3),
    "loha": lora("loha", alpha=3),
    "loha-tucker": lora("loha", options={"use_effective_conv2d": True}),
    "lokr": lora("lokr", alpha=1, rank=1),
    "lokr-whole": lora("lokr", rank=64, alpha=32),
    "lokr-both": lora("lokr", rank=1, options={"decompose_both": True, "decompose_factor": 4}),
}
ROTATIONS = {"oft": lora("oft", SMALL, rank=4), "boft": lora("boft", rank=4)}


@pytest.mark.parametrize("kind", [*KINDS, *ROTATIONS])
def test_to_peft(base, tmp_path, kind, capsys):
    """`PeftModel` loads it onto diffusers' UNet, and both its layers and ours from the folder answer as ours did."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    import peft

    model, folder = base
    family = (KINDS | ROTATIONS)[kind]
    names = family["params"]["targets"]
    plain = answers(model, names, model)
    expected = answers(tuned(model, tmp_path / "own", family), names, model)
    out = convert(tmp_path / "own", tmp_path / "peft", "peft-kinds", folder)
    assert identify(out) == "peft-kinds" and describe(out)["layers"] == len(names)
    loaded = copy.deepcopy(model)
    load_any(loaded, out)
    same(answers(loaded, names, model), expected, plain)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "diffusers/unet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet = peft.PeftModel.from_pretrained(unet, out).eval().base_model.model
    theirs = layers.dialects(model)["diffusers"]
    found = {name: unet.get_submodule(theirs[name].removeprefix("unet.")) for name in names}
    inputs = {name: layer_of(model, name) for name in names}
    same(outputs(inputs, through=found), expected, plain)


def test_the_names_that_comfyui_and_web_uis_look_for(base, tmp_path, capsys):
    """Their tables have kohya's name of every weight of diffusers' UNet, norms too, and these names of tensors."""
    model, folder = base
    targets = [LINEAR[0], CONVOLUTIONS[0], TEXT]
    tuned(model, tmp_path / "own", lora("loha", targets), {"family": "norms"})
    out = convert(tmp_path / "own", tmp_path / "x", "lycoris", folder, "--base", folder / "base.safetensors")
    layers = [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_0_resnets_1_conv1",
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    ]
    norms = [
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm2",
        "lora_unet_down_blocks_0_resnets_1_norm1",
        "lora_unet_mid_block_resnets_0_norm2",
        "lora_unet_conv_norm_out",
    ]
    held = load_file(out)
    factors = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha")
    assert {key for key in held if "norm" not in key} == {f"{layer}.{name}" for layer in layers for name in factors}
    assert {f"{norm}.{name}" for norm in norms for name in ("w_norm", "b_norm")} <= held.keys()


def test_into_a_model_for_good(base, tmp_path, capsys):
    """`ldm lora-add --mode upl-ckpt-v2` gives the weights that loading gives, at a strength as well."""
    model, folder = base
    tuned(model, tmp_path / "own", KINDS["dora"])
    out = convert(tmp_path / "own", tmp_path / "x.safetensors", "lycoris", folder)
    words = [folder / "base.safetensors", out, tmp_path / "m.safetensors", "0.6", "--mode", "upl-ckpt-v2"]
    Program("lora-add")([*map(str, words), "--config", str(folder / "model.yaml")])
    loaded, merged = copy.deepcopy(model), load_file(tmp_path / "m.safetensors")
    load_any(loaded, out, 0.6)
    expected = loaded.state_dict()
    for name in LAYERS:
        assert_close_to(merged[f"{name}.weight"], expected[f"{name}.weight"], 1e-6)
        assert not torch.equal(merged[f"{name}.weight"], model.state_dict()[f"{name}.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_to_lycoris(base, tmp_path, kind, capsys):
    """LyCORIS's own modules, made of the file, answer as ours did, and so does our model with the file."""
    library = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed: pip install .[test]")
    model, folder = base
    plain, expected = answers(model, LAYERS, model), answers(tuned(model, tmp_path / "own", KINDS[kind]), LAYERS, model)
    out = convert(tmp_path / "own", tmp_path / "x.safetensors", "lycoris", folder)
    assert identify(out) == "lycoris"
    loaded = copy.deepcopy(model)
    load_any(loaded, out)
    same(answers(loaded, LAYERS, model), expected, plain)
    copies = loaded_by_lycoris(library, model, out, LAYERS)
    same(outputs({name: layer_of(model, name) for name in LAYERS}, copies), expected, plain)


def test_what_lycoris_has_no_kind_for_goes_as_differences(base, tmp_path, capsys):
    """Rotations of inputs, and tuned weights and norms, which are values here and differences there."""
    library = pytest.importorskip("lycoris.modules", reason="lycoris-lora is not installed: pip install .[test]")
    model, folder = base
    families = [
        lora("oft", LAYERS, rank=4),
        {"family": "norms"},
        {"family": "weights-by-name", "params": {"pattern": r"attn1\.to_k\.weight$"}},
    ]
    names = [*LAYERS, *NORMS, f"{BLOCK}.attn1.to_k"]
    plain, expected = answers(model, names, model), answers(tuned(model, tmp_path / "own", *families), names, model)
    source, out = tmp_path / "own", tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="holds tuned base weights .* add --base MODEL"):
        convert(source, out, "lycoris", folder)
    convert(source, out, "lycoris", folder, "--base", folder / "base.safetensors")
    loaded = copy.deepcopy(model)
    load_any(loaded, out)
    same(answers(loaded, names, model), expected, plain, 1e-3)  # differences are in half precision
    copies = loaded_by_lycoris(library, model, out, names)
    same(outputs({name: layer_of(model, name) for name in names}, copies), expected, plain, 1e-3)


def test_what_a_format_cannot_hold(base, tmp_path):
    model, folder = base
    for number, (families, to, message) in enumerate(
        [
            (
                [lora("oft", SMALL, rank=4)],
                "lycoris",
                "OFT of PEFT, which rotates the inputs .*--to peft-kinds keeps it",
            ),
            ([lora("oft", LAYERS, rank=4)], "peft-kinds", "rotates patches of the picture there: no PEFT folder"),
            ([lora("loha")], "kohya", "loha is no low-rank sum, .*: --to lycoris or peft-kinds"),
            ([lora("loha", SMALL[:1]), lora("lokr", SMALL[1:], rank=1)], "peft-kinds", "holds LoHa and LoKr; a PEFT"),
            ([lora("loha", SMALL), lora("lokr", SMALL, rank=1)], "lycoris", "changes .* twice"),
            ([lora("loha", SMALL, options={"alpha_pattern": {"to_q": 1}})], "lycoris", "alpha_pattern"),
        ]
    ):
        tuned(model, tmp_path / f"own{number}", *families)
        with pytest.raises(InputError, match=message):
            convert(tmp_path / f"own{number}", tmp_path / "x", to, folder)
        assert not (tmp_path / "x").exists()
