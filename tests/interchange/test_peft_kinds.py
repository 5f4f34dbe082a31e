"""Folders that PEFT writes for LoHa, LoKr, DoRA, OFT, BOFT and (IA)3, read here; diffusers' UNet is the host."""

import copy
import json
import warnings

import pytest
import torch

from ldm.errors import InputError
from ldm.interchange import (
    Context,
    by_name,
    diffusers_model,
    identify,
    layers,
    load_any,
    open_file,
    read_lora,
    rotations,
)
from ldm.interchange.inspection import describe
from ldm.interchange.kinds import Part
from tests import interchange_models
from tests.helpers import assert_close_to
from tests.interchange.test_lycoris import CONVOLUTIONS, LINEAR, layer_of, outputs

torch.set_num_threads(1)
ALL = [*LINEAR, *CONVOLUTIONS]
FLAT = [*LINEAR, CONVOLUTIONS[1]]  # OFT of PEFT is no change of a 3 x 3 convolution's weight
HERE = "down_blocks.0.attentions.0"

CASES = {
    "dora": ("LoraConfig", {"r": 3, "lora_alpha": 2, "use_dora": True, "init_lora_weights": False}),
    "dora-rs": (
        "LoraConfig",
        {"r": 4, "lora_alpha": 2, "use_dora": True, "use_rslora": True, "init_lora_weights": False},
    ),
    "loha": ("LoHaConfig", {"r": 3, "alpha": 2, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn1.to_q": 5}}),
    "loha-tucker": ("LoHaConfig", {"r": 3, "alpha": 2, "use_effective_conv2d": True}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 3, "decompose_factor": 4}),
    "lokr-whole": ("LoKrConfig", {"r": 64, "alpha": 32}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "r": 0}),
    "oft-shared": ("OFTConfig", {"oft_block_size": 8, "r": 0, "block_share": True, "use_cayley_neumann": False}),
    "oft-limited": (
        "OFTConfig",
        {"oft_block_size": 4, "r": 0, "coft": True, "eps": 0.5, "num_cayley_neumann_terms": 3},
    ),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": [f"{HERE}.transformer_blocks.0.ff.net.0.proj", f"{HERE}.proj_in"]}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Our model and diffusers' UNet of the same weights."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    config = interchange_models.small_config(tmp_path_factory.mktemp("clip"))
    model = interchange_models.small_model(config)
    folder = tmp_path_factory.mktemp("diffusers") / "small"
    diffusers_model.write_folder(folder, model.state_dict(), config.model.params)
    return model, diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")


def written(model, unet, case, folder, names):
    """A folder of PEFT with random values, and the layers that it has wrapped."""
    import peft

    theirs = {name: other.removeprefix("unet.") for name, other in layers.dialects(model)["diffusers"].items()}
    kind, settings = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, kind)(target_modules=[theirs[name] for name in names], **settings)
        wrapped = peft.get_peft_model(copy.deepcopy(unet), config).eval()
    generator = torch.Generator().manual_seed(4)
    for name, value in wrapped.named_parameters():
        if value.requires_grad:
            start = value.data if name.endswith(("ia3_l.default", "boft_s.default", "vector.default.weight")) else 0
            value.data = start + 0.2 * torch.randn(value.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return {name: wrapped.base_model.model.get_submodule(theirs[name]) for name in names}


@pytest.mark.parametrize("case", CASES)
def test_we_act_as_peft_does(base, tmp_path, case):
    model, unet = copy.deepcopy(base[0]), base[1]
    names = FLAT if case.startswith("oft") else ALL
    ours = {name: layer_of(model, name) for name in names}
    plain = outputs(ours)
    expected = outputs(ours, written(model, unet, case, tmp_path / "x", names))
    assert identify(tmp_path / "x") == "peft-kinds" and describe(tmp_path / "x")["layers"] == len(names)
    load_any(model, tmp_path / "x")
    for name, found in outputs(ours).items():
        assert (expected[name] - plain[name]).norm() > 0.002 * plain[name].norm(), name
        assert_close_to(found, expected[name], 1e-5)


def test_refusals(base, tmp_path):
    model, unet = base
    written(model, unet, "oft", tmp_path / "oft", FLAT)
    with pytest.raises(InputError, match="oft is OFT of PEFT: such a rotation has no strength but 1; got 0.5"):
        load_any(model, tmp_path / "oft", 0.5)
    with pytest.raises(
        InputError, match="by OFT of PEFT, which is no product of small factors: plain LoRA cannot hold it"
    ):
        read_lora(tmp_path / "oft", model)
    written(model, unet, "oft", tmp_path / "large", ALL)
    with pytest.raises(InputError, match="in_layers.2: PEFT's OFT on a convolution larger than 1 x 1 rotates patches"):
        load_any(model, tmp_path / "large")
    config = tmp_path / "oft/adapter_config.json"
    given = json.loads(config.read_text())
    config.write_text(json.dumps(given | {"peft_type": "VERA"}))
    with pytest.raises(InputError, match="oft is of PEFT's type 'VERA'; expected one of LORA, LOHA"):
        load_any(model, tmp_path / "oft")
    config.write_text(json.dumps(given | {"peft_type": "LOHA"}))
    with pytest.raises(InputError, match="is OFT of PEFT, but adapter_config.json says LOHA"):
        load_any(model, tmp_path / "oft")
    written(model, unet, "loha", tmp_path / "loha", ALL)
    config = tmp_path / "loha/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alpha": "big"}))
    with pytest.raises(InputError, match="alpha of 'down_blocks.* must be a finite number, got 'big'"):
        load_any(model, tmp_path / "loha")


def test_butterflies_of_several_stages():
    """PEFT trains them on GPUs alone; its permutations and its product of stages, with the matrices written out."""
    import peft
    from torch import nn

    layer = peft.tuners.boft.layer.Linear(nn.Linear(32, 6), "one", peft.BOFTConfig(boft_block_size=4))
    stages, blocks, generator = 3, 8, torch.Generator().manual_seed(0)
    raw = 0.3 * torch.randn(stages, blocks, 4, 4, generator=generator)
    scale, weight = torch.rand(6, 1, generator=generator), torch.randn(6, 32, generator=generator)
    product = torch.eye(32)
    for stage in range(stages):
        order = layer.block_butterfly_perm(32, blocks // 2**stage, 2, stages - 1)
        permutation = layer.perm2mat(order)
        product = permutation @ torch.block_diag(*layer.cayley_batch(raw[stage])) @ permutation.T @ product
    expected = (product @ weight.T).T * scale
    found = rotations.butterfly_of_inputs(Part("boft-peft", {"boft_R": raw, "boft_s": scale}), weight)
    assert_close_to(weight + found, expected, 1e-5)


def test_ia3_through_our_forms_and_back(base, tmp_path):
    """What was read is written as PEFT's folder again, tensor for tensor; LyCORIS leaves the biases alone."""
    from safetensors.torch import load_file

    model, unet = base
    written(model, unet, "ia3", tmp_path / "x", ALL)
    row, context = by_name("peft-kinds"), Context(model, source="x")
    value = row.read("kinds", open_file(tmp_path / "x"), context)
    row.write(tmp_path / "y", value, context)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "xy")
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    with pytest.raises(InputError, match=r"x multiplies biases, too, by .*: --to peft-kinds keeps it"):
        by_name("lycoris").write(tmp_path / "z", value, context)
