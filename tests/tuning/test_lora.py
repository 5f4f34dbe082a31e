"""LoRA and its kin: starts, names, merging, patterns, published layers, compilation, checkpointing."""

import json
from fnmatch import fnmatchcase

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.errors import InputError
from ldm.tuning import files
from ldm.tuning.lora import KINDS, TEXT_ATTENTION, UNET_ATTENTION, LoRA, merge, wrapped
from tests.helpers import assert_close_to
from tests.tuned_models import UNET, answer, base_weights, batch, family, model, shake

pytestmark = pytest.mark.slow

EVERYWHERE = [*UNET_ATTENTION, "model.*.in_layers.2", "model.*.skip_connection", *TEXT_ATTENTION]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def lora(kind="lora", **params):
    return family("lora.LoRA", **{"kind": kind, "rank": 4, "targets": EVERYWHERE} | params)


@EVERY_KIND
def test_starts_as_the_base(kind):
    assert_close_to(answer(model([lora(kind)])), answer(model()), 1e-6)


@EVERY_KIND
def test_merging_leaves_a_plain_model_with_the_same_answer(kind):
    tuned = shake(model([lora(kind)]))
    expected = answer(tuned)
    assert (expected - answer(model())).abs().max() > 1e-2
    merge(tuned)
    assert not list(wrapped(tuned)) and list(tuned.state_dict()) == list(base_weights())
    assert_close_to(answer(tuned), expected, 1e-5)


@EVERY_KIND
def test_a_folder_rebuilds_every_kind(kind, tmp_path):
    tuned = shake(model([lora(kind)]))
    files.save(tuned, tmp_path / "folder")
    fresh = model()
    files.load(fresh, tmp_path / "folder")
    assert torch.equal(answer(fresh.eval()), answer(tuned))


@pytest.mark.parametrize("kind", ["lora", "rslora", "loha", "lokr"])
def test_half_the_strength_is_half_the_change_of_a_weight(kind, tmp_path):
    tuned = shake(model([lora(kind)]))
    files.save(tuned, tmp_path / "folder")
    whole, half = model(), model()
    files.load(whole, tmp_path / "folder"), files.load(half, tmp_path / "folder", 0.5)
    merge(whole), merge(half)
    for name, base in base_weights().items():
        if base.is_floating_point():
            assert_close_to(half.state_dict()[name] - base, 0.5 * (whole.state_dict()[name] - base), 1e-4)


@pytest.mark.parametrize("kind", ["oft", "boft"])
def test_rotations_keep_lengths_and_have_no_strength(kind, tmp_path):
    params = {"options": {"use_cayley_neumann": False}} if kind == "oft" else {}
    tuned = shake(model([lora(kind, targets=["model.*.attn2.to_v"], **params)]))
    merge(tuned)
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
    base, rotated = base_weights()[name], tuned.state_dict()[name]
    assert not torch.equal(base, rotated)
    if kind == "oft":  # BOFT also scales the outputs
        assert_close_to(rotated.norm(dim=1), base.norm(dim=1), 1e-5)
    files.save(shake(model([lora(kind)])), tmp_path / "folder")
    with pytest.raises(InputError, match="a rotation has no strength but 1"):
        files.load(model(), tmp_path / "folder", 0.5)


def test_kinds_may_sit_on_the_same_layers(tmp_path):
    tuned = shake(model([lora("lora"), lora("loha")]))
    expected = answer(tuned)
    files.save(tuned, tmp_path / "folder")
    fresh = model()
    files.load(fresh, tmp_path / "folder")
    assert torch.equal(answer(fresh.eval()), expected)
    merge(tuned)
    assert_close_to(answer(tuned), expected, 1e-5)
    assert list(tuned.state_dict()) == list(base_weights())


def test_patterns_have_ranks_and_alphas_of_their_own():
    targets = {
        "model.*.attn2.to_?": None,
        "model.*.attn2.to_k": {"rank": 1, "alpha": 3},
        "model.*.in_layers.2": {"rank": 2},
    }
    tuned = model([lora(targets=targets, rank=8, alpha=4)])
    for name, layer in wrapped(tuned):
        rank, alpha = (1, 3) if name.endswith("to_k") else (2, 4) if name.endswith("in_layers.2") else (8, 4)
        assert layer.lora_A["default"].weight.shape[0] == rank and layer.scaling["default"] == alpha / rank
    names = [name for name, _ in wrapped(tuned)]
    assert len(names) == 4 * 3 + 8
    assert all(any(fnmatchcase(name, pattern) for pattern in targets) for name in names)


def test_rank_stabilised_scaling():
    (layer,) = {layer.scaling["default"] for _, layer in wrapped(model([lora("rslora", rank=4, alpha=6)]))}
    assert layer == 6 / 4**0.5


def test_dropout_acts_in_training_only():
    tuned = shake(model([lora(dropout=0.5)]))
    assert torch.equal(answer(tuned), answer(tuned))
    tuned.train()
    assert not torch.equal(answer(tuned), answer(tuned))


def test_the_start_is_seeded():
    starts = [model([lora(seed=seed)]).trainable_parameters() for seed in (0, 0, 1)]
    name = next(name for name in starts[0] if "lora_A" in name)
    assert torch.equal(starts[0][name], starts[1][name]) and not torch.equal(starts[0][name], starts[2][name])


@pytest.mark.parametrize("name", ["linear_nobias", "linear_bias", "conv3x3_s2p1", "conv1x1"])
def test_layers_are_the_published_ones(golden, name):
    """y = base(x) + scale * up(down(x)), scale 0.7."""
    index = json.loads((golden / "lora/layers.json").read_text())[name]
    stored = load_file(golden / "lora/tensors.safetensors")
    data = {key.split("/")[-1]: value for key, value in stored.items() if key.startswith(f"layer/{name}/")}
    inner = "linear" if index["kind"] == "lin" else "conv"
    kind = {"lin": nn.Linear, "conv": nn.Conv2d}[index["kind"]]
    holder = nn.ModuleDict({"layer": kind(**index["kwargs"])})
    holder["layer"].load_state_dict({k.removeprefix(inner + "."): v for k, v in data.items() if k.startswith(inner)})
    tuned = LoRA(["layer"], rank=index["r"], alpha=index["r"] * index["scale"])
    tuned.install(holder)
    assert_close_to(holder["layer"](data["x"]), data["y_base"], 1e-6)
    down, up = tuned.trainable(holder).values()
    with torch.no_grad():
        down.copy_(data["lora_down.weight"]), up.copy_(data["lora_up.weight"])
    assert_close_to(holder["layer"](data["x"]), data["y"], 1e-5)


def test_compiles_as_one_graph():
    """What DoRA does within peft 0.21 breaks the graph; LoRA does not."""
    tuned = shake(model([lora()]))
    unet = tuned.model.diffusion_model
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 32, 128)
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_close_to(compiled(*inputs), unet(*inputs), 1e-6)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for flag in (False, True):
        tuned = shake(model([lora()], unet={"use_checkpoint": flag})).train()
        torch.manual_seed(0)
        tuned.losses([batch()])[0][0].backward()
        gradients.append({name: value.grad for name, value in tuned.trainable_parameters().items()})
    assert UNET["params"].get("use_checkpoint") is None
    for name, gradient in gradients[0].items():
        assert_close_to(gradients[1][name], gradient, 1e-5)


@pytest.mark.parametrize(
    "params,message",
    [
        ({"kind": "lroa"}, "kind must be one of lora, rslora, dora"),
        ({"rank": 0}, "rank of .* must be at least 1, got 0"),
        ({"targets": {"*": {"r": 3}}}, "targets know rank and alpha, not r"),
        (
            {"targets": ["*.attn3.*"]},
            r"no linear or convolution layer matches '\*.attn3.\*'; its layers have names such as",
        ),
        ({"dropout": 1}, "dropout must be at least 0 and below 1"),
        ({"options": {"nonsense": 1}}, "options: unknown 'nonsense'; expected some of"),
        ({"options": {"megatron_config": {"a": 1}, "megatron_core": "evil"}}, "options: unknown 'megatron_config'"),
    ],
)
def test_refusals(params, message):
    with pytest.raises(InputError, match=message):
        model([lora(**params)])
