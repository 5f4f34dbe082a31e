"""`ldm merge` and `ldm resize` on LoRAs, and `ldm distill --layers all`, against sums and SVDs of whole changes."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import read_weights, save_safetensors
from ldm.commands import Program
from ldm.errors import InputError
from ldm.interchange import identify, lora_keys
from ldm.interchange.lora import delta
from tests import interchange_models
from tests.helpers import assert_close_to
from tests.interchange.test_lora_keys import random_lora

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the config and the checkpoint of a small model, and two LoRAs; the model; the LoRAs."""
    folder = tmp_path_factory.mktemp("base")
    config = interchange_models.small_config(folder / "clip")
    model = interchange_models.small_model(config)
    OmegaConf.save(config, folder / "model.yaml")
    interchange_models.save(model, folder / "base.safetensors")
    loras = [
        random_lora(model, ["attn2", "input_blocks.4.0.in_layers"], 3, 0.7, seed=1),
        random_lora(model, ["attn2.to_k", "self_attn.q_proj"], 2, 1.5, seed=2),
    ]
    lora_keys.write_kohya(folder / "a.safetensors", loras[0], model)
    lora_keys.write_diffusers(folder / "b.safetensors", loras[1], model)
    return folder, model, loras


def ldm(verb, folder, *words):
    Program(verb)([*map(str, words), "--config", str(folder / "model.yaml")])


def whole(loras, weights):
    """The sum of the whole changes by layer."""
    total = {}
    for lora, weight in zip(loras, weights, strict=True):
        for name, factors in lora.layers.items():
            total[name] = total.get(name, 0) + weight * delta(factors)
    return total


def best(change, rank):
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    return (u[:, :rank] * s[:rank] @ vh[:rank]).reshape(change.shape)


def test_merge_is_the_sum_of_what_they_do(base, tmp_path, capsys):
    folder, model, loras = base
    paths = folder / "a.safetensors", folder / "b.safetensors", folder / "a.safetensors"
    out = tmp_path / "x.safetensors"
    ldm("merge", folder, *paths, "--weights", 0.6, -0.5, 0.1, "--out", out)
    assert identify(out) == "kohya" and "ranks [2, 6, 8]" in capsys.readouterr().out
    found, expected = lora_keys.read(out, model), whole(loras, [0.7, -0.5])
    assert found.layers.keys() == expected.keys()
    for name, change in expected.items():
        assert_close_to(delta(found.layers[name]), change, 1e-5)
    ldm("merge", folder, *paths[:2], "--rank", 2, "--to", "diffusers", "--out", out, "--force")
    found = lora_keys.read(out, model)
    assert identify(out) == "diffusers" and found.ranks() == [2]
    for name, change in whole(loras, [1, 1]).items():
        assert_close_to(delta(found.layers[name]), best(change, 2), 1e-4)


def test_merge_by_blocks(base, tmp_path, capsys):
    folder, model, loras = base
    out, numbers = tmp_path / "x.safetensors", ["0.5"] + ["1"] * 12 + ["0"] + ["2"] * 12
    words = [folder / "a.safetensors", folder / "b.safetensors", "--out", out]
    ldm("merge", folder, *words, "--block_weights", ",".join(numbers), "OUTALL")
    found, blocks = (
        lora_keys.read(out, model),
        {"input_blocks": (1, 0), "middle_block": (0, 0), "output_blocks": (2, 1)},
    )
    one, two = loras
    for name in one.layers.keys() | two.layers.keys():
        weights = next((pair for block, pair in blocks.items() if block in name), (0.5, 1))
        expected = whole([lora for lora in loras if name in lora.layers],
                         [w for lora, w in zip(loras, weights, strict=True) if name in lora.layers])[name]  # fmt: skip
        if expected.abs().max() == 0:
            assert name not in found.layers
        else:
            assert_close_to(delta(found.layers[name]), expected, 1e-5)


def test_resize(base, tmp_path, capsys):
    folder, model, loras = base
    out = tmp_path / "x.safetensors"
    ldm("resize", folder, folder / "a.safetensors", out, "--new_rank", 2, "--new_conv_rank", 1)
    found = lora_keys.read(out, model)
    for name, factors in loras[0].layers.items():
        assert_close_to(delta(found.layers[name]), best(delta(factors), 1 if factors.down.dim() > 2 and
                                                        factors.down.shape[-1] > 1 else 2), 1e-4)  # fmt: skip
    ldm("resize", folder, folder / "a.safetensors", out, "--dynamic_method", "sv_ratio", "--dynamic_param", 1.5,
        "--verbose", "--force")  # fmt: skip
    found, told = lora_keys.read(out, model), capsys.readouterr().out
    for name, factors in loras[0].layers.items():
        values = torch.linalg.svdvals(delta(factors).flatten(1))
        rank = int((values > values[0] / 1.5).sum())
        assert found.layers[name].rank == rank and f"{name}  rank 3 -> {rank}, " in told


@pytest.mark.parametrize("criterion", [["--rank", 2], ["--rank", 3, "--sv_fro", 0.8]])
def test_distill_all_layers_that_differ(base, tmp_path, criterion, capsys):
    """`published` has no place for such convolutions as `proj_in` and the upsampling; `all` takes what differs."""
    folder, model, _ = base
    names = ["input_blocks.1.1.proj_in", "output_blocks.2.1.conv", "time_embed.0", "attn1.to_v"]
    lora, weights = random_lora(model, names, 3, 1.0, 5), read_weights(folder / "base.safetensors")
    tuned = dict(weights)
    for name, factors in lora.layers.items():
        tuned[f"{name}.weight"] = weights[f"{name}.weight"] + delta(factors).reshape(weights[f"{name}.weight"].shape)
    save_safetensors(tmp_path / "tuned.safetensors", tuned)
    out = tmp_path / "x.safetensors"
    ldm("distill", folder, tmp_path / "tuned.safetensors", folder / "base.safetensors", "--layers", "all", *criterion,
        "--format", "kohya", "--save_path", out, "--device", "cpu")  # fmt: skip
    found = lora_keys.read(out, model)
    assert found.layers.keys() == lora.layers.keys()
    for name, factors in found.layers.items():
        change = (tuned[f"{name}.weight"] - weights[f"{name}.weight"]).flatten(1)
        values = torch.linalg.svdvals(change)
        shares = (values.square().cumsum(0) / values.square().sum()).sqrt()
        rank = 2 if len(criterion) == 2 else min(3, int((shares < 0.8).sum()) + 1)
        assert factors.rank == rank
        assert_close_to(delta(factors).flatten(1), best(change, rank), 1e-4)
    with pytest.raises(InputError, match="have the same layers: there is nothing to extract"):
        ldm("distill", folder, folder / "base.safetensors", folder / "base.safetensors", "--layers", "all",
            "--save_path", tmp_path / "y", "--device", "cpu")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resize", "a", "OUT"], "expected --rank, or --dynamic_method with --dynamic_param"),
        (["resize", "a", "OUT", "--sv_ratio", 2, "--sv_fro", 0.5], "expected one method, got sv_ratio and sv_fro"),
        (["resize", "a", "OUT", "--dynamic_method", "sv_fro"], "--dynamic_method sv_fro needs --dynamic_param"),
        (["resize", "a", "OUT", "--dynamic_param", 2], "--dynamic_param needs --dynamic_method"),
        (["resize", "base", "OUT", "--rank", 2], "is the weights of a whole model; expected a LoRA"),
        (["merge", "a", "b", "--weights", 1, "--out", "OUT"], "1 --weights for 2 files"),
        (["merge", "a", "b", "--block_weights", "ALL", "ALL", "ALL", "--out", "OUT"], "3 --block_weights for 2 files"),
        (["merge", "a", "b", "--stack", "--out", "OUT"], "--stack is for position adapters"),
        (
            ["merge", "a", "b", "--block_weights", "NONE", "--out", "OUT"],
            "nothing is left of .*every layer has the weight 0",
        ),
    ],
)
def test_refusals(base, tmp_path, words, message):
    folder = base[0]
    files = {name: folder / f"{name}.safetensors" for name in ("a", "b", "base")} | {"OUT": tmp_path / "x"}
    with pytest.raises(InputError, match=message):
        ldm(words[0], folder, *(files.get(word, word) for word in words[1:]))
    assert not (tmp_path / "x").exists()
