"""The commands on files, each through its `main`: what they write, the published flags, and refusals."""

import importlib
import json
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import read_weights
from ldm.commands import lora_add
from ldm.errors import InputError
from ldm.interchange import (
    Context,
    by_name,
    cloneofsimo,
    custom_diffusion,
    embeddings,
    load_any,
    lora_keys,
    read_lora,
)
from ldm.interchange.lora import delta
from ldm.interchange.names import UNET
from tests import interchange_models
from tests.conftest import ROOT
from tests.helpers import assert_close_to
from tests.interchange.test_lora_keys import random_lora, same
from tests.interchange_models import run
from tests.modules.test_position_sums import saved as saved_adapter
from tests.runs import ENVIRONMENT

pytestmark = pytest.mark.slow

torch.set_num_threads(1)
SCRIPTS = [
    "get_deltas",
    "compress",
    "compose",
    "inspect_adapter",
    "lora_add",
    "lora_distill",
    "convert",
    "merge_adapters",
]


def published(golden, script):
    return json.loads((golden / "manifests/published_cli.json").read_text())[script]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(name, "--help")
    assert exit_.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "origin"),
    [
        ("get_deltas", "custom-diffusion/src/get_deltas.py"),
        ("compose", "custom-diffusion/src/composenW.py"),
        ("compress", "custom-diffusion/src/compress.py"),
        ("convert", "custom-diffusion/src/convert.py"),
    ],
)
def test_the_published_flags(golden, script, origin):
    parser = importlib.import_module(f"scripts.{script}").main.parser()
    ours = {flag: action for action in parser._actions for flag in action.option_strings}
    for flag in published(golden, origin):
        action = ours[flag["flags"][0]]
        if flag.get("default") is not None and flag["flags"][0] not in ("--config", "--mode", "--sd_version"):
            assert action.default == flag["default"]
        if "choices" in flag:
            assert set(flag["choices"]) <= set(action.choices)


@pytest.mark.parametrize(
    ("script", "origin"),
    [
        ("lora_add", "lora/lora_diffusion/cli_lora_add.py:add"),
        ("lora_distill", "lora/lora_diffusion/cli_svd.py:svd_distill"),
    ],
)
def test_the_published_arguments(golden, script, origin):
    ours = {action.dest: action for action in importlib.import_module(f"scripts.{script}").main.parser()._actions}
    for argument in published(golden, origin):
        assert argument["name"] in ours
        # `--clamp_quantile` has the published default for the published layers, and another for all layers.
        if not argument["required"] and argument["name"] not in ("device", "alpha_1", "alpha_2", "clamp_quantile"):
            assert ours[argument["name"]].default == argument["default"]


def test_the_published_weights_of_lora_add(golden):
    parser = importlib.import_module("scripts.lora_add").main.parser()
    told = {
        argument["name"]: argument["default"]
        for argument in published(golden, "lora/lora_diffusion/cli_lora_add.py:add")
    }
    assert lora_add.alphas(parser.parse_args(["a", "b", "c"]), []) == (told["alpha_1"], told["alpha_2"])


def test_a_refusal_is_one_line_and_code_2(tmp_path):
    """As a process, the way users start it."""
    command = [sys.executable, ROOT / "scripts/inspect_adapter.py", tmp_path / "nothing.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == f"error: checkpoint {tmp_path}/nothing.pt does not exist"


# --- Custom Diffusion


def test_get_deltas_keeps_its_source(golden, tmp_path, capsys):
    expected = torch.load(golden / "custom_diffusion/delta_epoch=000004.ckpt", weights_only=True)
    weights = dict(expected["state_dict"])
    weights[custom_diffusion.EMBEDDINGS] = torch.cat([torch.zeros(3, 24), weights.pop("embed")])
    (tmp_path / "checkpoints").mkdir()
    for name in ("epoch=000004.ckpt", "last.ckpt"):
        torch.save({"state_dict": weights}, tmp_path / "checkpoints" / name)
    run("get_deltas", "--path", tmp_path)
    names = ["delta_epoch=000004.ckpt", "epoch=000004.ckpt", "last.ckpt"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names
    ours = torch.load(tmp_path / "checkpoints" / names[0], weights_only=True)
    assert list(ours["state_dict"]) == list(expected["state_dict"])
    assert all(torch.equal(ours["state_dict"][n], v) for n, v in expected["state_dict"].items())
    assert "14 weights, 1 new words" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists: name another output or add --force"):
        run("get_deltas", "--path", tmp_path)
    run("get_deltas", "--path", tmp_path / "checkpoints", "--newtoken", 0, "--force")
    assert "embed" not in torch.load(tmp_path / "checkpoints" / names[0], weights_only=True)["state_dict"]
    with pytest.raises(InputError, match="--newtoken -1: expected how many new words there are, 0 or more"):
        run("get_deltas", "--path", tmp_path, "--newtoken", -1, "--force")


def test_compress(base, tuned, tmp_path, capsys):
    custom_diffusion.write(tmp_path / "delta.ckpt", tuned)
    run("compress", "--delta_ckpt", tmp_path / "delta.ckpt", "--ckpt", base[0])
    packed = custom_diffusion.read(tmp_path / "compressed_delta.ckpt")
    expected = custom_diffusion.compress(tuned, base[2].state_dict())
    assert [v.v.shape for v in packed.weights.values()] == [v.v.shape for v in expected.weights.values()]
    assert "MB ->" in capsys.readouterr().out
    custom_diffusion.write(tmp_path / "delta.bin", tuned, "diffusers")
    run("compress", "--delta_ckpt", tmp_path / "delta.bin", "--ckpt", base[0], "--diffuser", "--compression_ratio", 0.9)
    assert set(torch.load(tmp_path / "compressed_delta.bin", weights_only=True)) == {"unet", "modifier_token"}
    lora_keys.write_kohya(tmp_path / "delta_not.safetensors", random_lora(base[2], ["attn2.to_q"]), base[2])
    with pytest.raises(InputError, match="no Custom Diffusion delta but of the kind kohya"):
        run("compress", "--delta_ckpt", tmp_path / "delta_not.safetensors", "--ckpt", base[0])


def test_of_weights_that_are_not_finite_nothing_is_made(base, tmp_path):
    checkpoint, config, model = base
    name = "model.diffusion_model.out.2.bias"
    torch.save({**model.state_dict(), name: torch.full((4,), torch.nan)}, tmp_path / "nan.ckpt")
    for to in ("diffusers-model", "checkpoint"):
        with pytest.raises(InputError, match=f"nan.ckpt: 1 of .* tensors are not finite, e.g. {name}"):
            run("convert", tmp_path / "nan.ckpt", tmp_path / "out", "--to", to, "--config", config)
    assert not (tmp_path / "out").exists()


def test_compose(base, tuned, tmp_path, capsys):
    paths = [tmp_path / f"{name}.ckpt" for name in "ab"]
    for path in paths:
        custom_diffusion.write(path, tuned)
    (tmp_path / "captions.txt").write_text("a photo of a dog on the beach\n\ntwo red hats in the snow by night\n" * 3)
    flags = [
        "--paths",
        "+".join(map(str, paths)),
        "--categories",
        "cat+wooden pot",
        "--ckpt",
        base[0],
        "--config",
        base[1],
    ]
    flags += ["--save_path", tmp_path / "logs", "--device", "cpu"]
    with pytest.raises(InputError, match="absent.txt cannot be read"):
        run("compose", *flags, "--regularization_prompt", tmp_path / "absent.txt")
    run("compose", *flags)  # by the captions of this package
    flags += ["--regularization_prompt", tmp_path / "captions.txt", "--force"]
    run("compose", *flags)
    output = tmp_path / "logs/cat_wooden-pot/checkpoints/delta_epoch=000000.ckpt"
    joint = custom_diffusion.read(output)
    assert list(joint.tokens) == ["<new1>", "<new2>"] and joint.weights.keys() == tuned.weights.keys()
    assert all(value.isfinite().all() for value in joint.weights.values())
    assert "<new1> (cat), <new2> (wooden pot)" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists"):
        run("compose", *flags[:-1])
    for path in paths:  # the published program for diffusers' layout
        by_name("delta-diffusers").write(path, tuned, Context())
    run("compose", *flags)
    other = custom_diffusion.read(tmp_path / "logs/cat_wooden-pot/delta.bin")
    assert torch.allclose(*(next(iter(one.weights.values())) for one in (other, joint)))


# --- convert, inspect, adapters


@pytest.mark.parametrize("start", ["diffusers", "kohya", "cloneofsimo", "cloneofsimo-pt"])
def test_convert_loras_in_a_circle(base, lora, tmp_path, start):
    from ldm.interchange.command import write_lora

    _, config, model = base
    kinds = ["diffusers", "kohya", "cloneofsimo", "cloneofsimo-pt"]
    kinds = kinds[kinds.index(start) :] + kinds[: kinds.index(start)] + [start]
    write_lora(tmp_path / "0", lora, model, start)
    for i, kind in enumerate(kinds[1:]):
        run("convert", tmp_path / str(i), tmp_path / str(i + 1), "--to", kind, "--config", config)
    with_model = interchange_models.small_model(OmegaConf.load(config))
    load_any(with_model, tmp_path / "4")
    same(lora, read_lora(tmp_path / "4", model), 3e-3)


def test_convert_models(base, tmp_path):
    checkpoint, config, _ = base
    run("convert", checkpoint, tmp_path / "folder", "--to", "diffusers-model", "--config", config)
    run("convert", tmp_path / "folder", tmp_path / "back.ckpt", "--to", "checkpoint", "--config", config)
    before, after = read_weights(checkpoint), read_weights(tmp_path / "back.ckpt")
    assert all(torch.equal(before[name], value) for name, value in after.items())
    lost = [name for name in before.keys() - after.keys() if "_model." in name and not name.endswith("position_ids")]
    assert not lost
    with pytest.raises(
        InputError, match=r"model.safetensors does not fit this config: .* has shape \[128, 32\], the c"
    ):
        run("convert", checkpoint, tmp_path / "wrong", "--to", "diffusers-model")
    assert not (tmp_path / "wrong").exists()


def test_convert_deltas_and_words(base, tuned, tmp_path):
    custom_diffusion.write(tmp_path / "d.ckpt", tuned)
    run("convert", tmp_path / "d.ckpt", tmp_path / "d.bin", "--to", "delta-diffusers", "--modifier_token", "<cat>")
    assert list(torch.load(tmp_path / "d.bin", weights_only=True)["modifier_token"]) == ["<cat>"]
    run("convert", tmp_path / "d.bin", tmp_path / "w.safetensors", "--to", "words")
    run("convert", tmp_path / "w.safetensors", tmp_path / "w.pt", "--to", "words-ldm")
    assert torch.equal(embeddings.read(tmp_path / "w.pt")["<w>"], tuned.tokens["<new1>"])
    with pytest.raises(InputError, match="cannot become kohya"):
        run("convert", tmp_path / "d.bin", tmp_path / "x", "--to", "kohya")
    with pytest.raises(InputError, match="expected INPUT OUTPUT --to FORMAT"):
        run("convert", tmp_path / "d.bin")


def test_a_concept_that_was_trained_here_leaves_as_a_delta(base, tmp_path, capsys):
    from ldm.tuning import choose, files

    checkpoint, config, _ = base
    model = interchange_models.small_model(OmegaConf.load(config))
    chosen = [
        choose({"target": "ldm.tuning.cross_attention.CrossAttention"}),
        choose({"target": "ldm.tuning.textual_inversion.TextualInversion", "params": {"words": ["<new1>"]}}),
    ]
    for one in chosen:
        one.family.install(model)
    model.tuning.families, model.is_tuned = chosen, True
    for parameter in chosen[0].family.trainable(model).values():
        parameter.data = parameter.data + 0.2
    files.save(model, tmp_path / "own")
    run("convert", tmp_path / "own", tmp_path / "delta", "--to", "delta")
    run("convert", tmp_path / "own", tmp_path / "word.safetensors", "--to", "words")
    other = interchange_models.small_model(OmegaConf.load(config))
    load_any(other, tmp_path / "delta")
    assert_close_to(interchange_models.unet_output(other), interchange_models.unet_output(model), 1e-4)
    word = embeddings.read(tmp_path / "word.safetensors")["<new1>"]
    assert torch.equal(word, torch.load(tmp_path / "delta", weights_only=True)["state_dict"]["embed"])
    run("inspect_adapter", tmp_path / "own")
    out = capsys.readouterr().out
    assert "CrossAttention {}: 32 tensors" in out and "<new1>: 1 x 24" in out


def test_a_word_that_is_no_name_for_a_file(tmp_path):
    words = {"<a/b>": torch.randn(1, 24), "<a_b>": torch.randn(1, 24)}
    cloneofsimo.write_safetensors(tmp_path / "words.safetensors", cloneofsimo.Published({}, {}, words))
    run("convert", tmp_path / "words.safetensors", tmp_path / "out", "--to", "words")
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) == 2 and {path.name for path in tmp_path.iterdir()} == {"words.safetensors", "out"}
    assert set().union(*(embeddings.read(file) for file in files)) == set(words)


def test_convert_by_the_published_modes(base, tuned, tmp_path):
    custom_diffusion.write(tmp_path / "d.ckpt", tuned)
    common = ["--ckpt", base[0], "--config", base[1]]
    run("convert", "--mode", "compvis-to-diffuser", "--delta_ckpt", tmp_path / "d.ckpt", *common)
    run("convert", "--mode", "diffuser-to-compvis", "--delta_ckpt", tmp_path / "delta.bin", *common)
    back = custom_diffusion.read(tmp_path / "delta_model.ckpt")
    assert all(torch.equal(back.weights[name], value) for name, value in tuned.weights.items())
    run("convert", "--mode", "compvis-to-webui", "--delta_ckpt", tmp_path / "d.ckpt", *common)
    merged, before = read_weights(tmp_path / "webui" / "model.ckpt"), read_weights(base[0])
    assert merged.keys() == before.keys()
    assert all(torch.allclose(merged[name], tuned.weights.get(name, before[name])) for name in merged)
    assert (tmp_path / "webui" / "embeddings" / "<new1>.pt").is_file()


def test_inspect(base, lora, tuned, tmp_path, capsys):
    _, _, model = base
    lora_keys.write_kohya(tmp_path / "lora", lora, model)
    custom_diffusion.write(tmp_path / "delta", tuned)
    run("inspect_adapter", "--json", tmp_path / "lora", tmp_path / "delta", base[0], saved_adapter(tmp_path, 1))
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [about["kind"] for about in told] == ["kohya", "delta", "checkpoint", "adapter"]
    assert told[0]["ranks"] == [2] and told[0]["layers"] == len(lora.layers) and told[0]["scales"] == [0.7]
    norm = sum(delta(f).norm() ** 2 for f in lora.layers.values()).sqrt().item()
    assert told[0]["norm of the change"] == pytest.approx(norm, rel=1e-4)
    assert told[1]["weights"] == 32 and list(told[1]["words"]) == ["<new1>"]
    from ldm.modules.adapter_files import own_fingerprint

    assert told[2]["base fingerprint"] == own_fingerprint(model.model.diffusion_model)
    assert told[3]["routes"][0].startswith("attn2o-ffni in ") and told[3]["parameters"] > 0
    run("inspect_adapter", tmp_path / "1", tmp_path / "lora")
    out = capsys.readouterr().out
    assert "attn2o-ffni" in out and "lora_unet" in out
    assert UNET not in out


def test_merge_adapters(tmp_path, capsys):
    one, two = saved_adapter(tmp_path, 1), saved_adapter(tmp_path, 2)
    run("merge_adapters", one, two, "--weights", 0.7, 0.3, "--out", tmp_path / "sum")
    assert "attn2o-ffni, mid_dim 8, scale 1" in capsys.readouterr().out
    run("merge_adapters", one, two, "--stack", "--out", tmp_path / "stack")
    run("merge_adapters", one, "--weights", 0.5, "--out", tmp_path / "half")
    assert "scale 0.5" in capsys.readouterr().out
    with pytest.raises(InputError, match="1 --weights for 2 files"):
        run("merge_adapters", one, two, "--weights", 1, "--out", tmp_path / "x")
    with pytest.raises(InputError, match="exists"):
        run("merge_adapters", one, two, "--out", tmp_path / "sum")
