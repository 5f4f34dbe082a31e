"""Adding and distilling LoRAs by their commands, each through its `main`; nothing is overwritten unasked."""

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.checkpoints import read_weights
from ldm.errors import InputError
from ldm.interchange import cloneofsimo, custom_diffusion, diffusers_model, embeddings, lora_keys, read_lora
from ldm.interchange.lora import Lora, delta, weighted_sum
from ldm.interchange.names import UNET
from tests import interchange_models
from tests.helpers import assert_close_to
from tests.interchange.test_lora_keys import random_lora, same
from tests.interchange_models import run
from tests.modules.test_position_sums import saved as saved_adapter

pytestmark = pytest.mark.slow

torch.set_num_threads(1)


def test_lora_add_lpl_and_ljl(golden, tmp_path):
    a, b = golden / "lora/A.safetensors", golden / "lora/B.safetensors"
    run("lora_add", a, b, tmp_path / "lpl.safetensors")
    run("lora_add", "--path_1", a, f"--path-2={b}", "--output_path", tmp_path / "ljl.safetensors", "--mode", "ljl")
    for ours, theirs in (("lpl", "merge_lpl"), ("ljl", "merge_ljl_A_B")):
        mine, expected = load_file(tmp_path / f"{ours}.safetensors"), load_file(golden / f"lora/{theirs}.safetensors")
        assert mine.keys() == expected.keys()
        for key in mine:
            assert_close_to(mine[key].float(), expected[key].float(), 1e-3)
    run("lora_add", golden / "lora/A.pt", golden / "lora/B.pt", tmp_path / "lpl.pt", "--with_text_lora=True")
    for name in ("lpl.pt", "lpl.text_encoder.pt"):
        for mine, theirs in zip(
            torch.load(tmp_path / name, weights_only=True),
            torch.load(golden / f"lora/merge_{name}", weights_only=True),
            strict=True,
        ):
            assert_close_to(mine.float(), theirs.float(), 1e-3)
    run("lora_add", golden / "lora/A.pt", golden / "lora/B.pt", tmp_path / "unet.pt")
    assert not (tmp_path / "unet.text_encoder.pt").exists()


def test_lora_add_takes_alphas_as_its_readme_writes_them(golden, tmp_path):
    """After the paths, by name, or as the one alpha of earlier versions: the ratio of the first to the second."""
    a, b = golden / "lora/A.safetensors", golden / "lora/B.safetensors"
    spellings = {"positions": [0.3, 0.7], "names": ["--alpha_1", 0.3, "--alpha-2", 0.7], "ratio": ["--alpha", 0.3]}
    found = []
    for name, alphas in spellings.items():
        run("lora_add", a, b, tmp_path / f"{name}.safetensors", *alphas)
        found.append(load_file(tmp_path / f"{name}.safetensors"))
    one, two = load_file(a), load_file(b)
    for result in found:
        assert_close_to(
            result["unet:0:up"].float(), 0.3 * one["unet:0:up"].float() + 0.7 * two["unet:0:up"].float(), 1e-3
        )
        assert all(torch.equal(result[name], found[0][name]) for name in found[0])
    for wrong, message in (
        ([0.3, "--alpha", 0.3], "one or two alphas"), (["x"], "expected numbers"), ([1, 2, 3], "one or two alphas"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            run("lora_add", a, b, tmp_path / "wrong.safetensors", *wrong)


def test_lora_add_sum(golden, base, lora, tmp_path):
    a, b = golden / "lora/A.safetensors", golden / "lora/B.safetensors"
    run("lora_add", a, b, tmp_path / "sum.safetensors", "--mode", "sum", "--alpha_1", 0.3, "--alpha-2", -2)
    one, two, both = (
        cloneofsimo.numbered(cloneofsimo.read_safetensors(p)) for p in (a, b, tmp_path / "sum.safetensors")
    )
    for name in one.layers:
        expected = 0.3 * delta(one.layers[name]) - 2 * delta(two.layers[name])
        assert_close_to(delta(both.layers[name]), expected, 2e-3)
    _, config, model = base
    lora_keys.write_kohya(tmp_path / "kohya", lora, model)
    lora_keys.write_diffusers(tmp_path / "peft", lora, model)
    run(
        "lora_add",
        tmp_path / "kohya",
        tmp_path / "peft",
        tmp_path / "x",
        "--mode",
        "sum",
        "--rank",
        2,
        "--config",
        config,
    )
    same(lora, lora_keys.read(tmp_path / "x", model), 1e-4)


def test_lora_add_sum_keeps_what_only_one_file_has(base, lora, tmp_path, capsys):
    """The text encoder, layers of other classes, another order; words where the format has a place for them."""
    _, config, model = base
    unet = Lora({name: f for name, f in lora.layers.items() if name.startswith(UNET)})
    both = Lora(lora.layers, {"<s1>": torch.randn(1, 24)})
    wider = random_lora(model, ["attn1", "in_layers"], rank=2, seed=6)
    names = {"unet": (unet, "diffusers"), "both": (both, "diffusers"), "ldm": (both, "ldm"), "wider": (wider, "ldm")}
    for name, (one, order) in names.items():
        cloneofsimo.write_safetensors(tmp_path / f"{name}.safetensors", cloneofsimo.from_lora(one, model, order))
    more = ["--mode", "sum", "--alpha_1", 0.5, "--alpha_2", 2, "--config", config]
    for a, b in (("unet", "both"), ("both", "unet"), ("ldm", "both"), ("wider", "both"), ("both", "wider")):
        output = tmp_path / f"{a}-{b}.safetensors"
        run("lora_add", tmp_path / f"{a}.safetensors", tmp_path / f"{b}.safetensors", output, *more)
        assert "words <s1>" in capsys.readouterr().out
        found, expected = read_lora(output, model), weighted_sum([names[a][0], names[b][0]], [0.5, 2])
        assert list(found.tokens) == ["<s1>"] and expected.layers.keys() <= found.layers.keys()
        same(expected, Lora({name: found.layers[name] for name in expected.layers}), 3e-3)
    run(
        "lora_add",
        tmp_path / "unet.safetensors",
        tmp_path / "both.safetensors",
        tmp_path / "k",
        *more,
        "--format",
        "kohya",
    )
    assert "the words <s1> are not in it: convert each file --to words" in capsys.readouterr().out


def test_nothing_is_overwritten_unasked(base, lora, tuned, tmp_path):
    """Neither what lies beside an output and is read with it, nor the words that a model cannot hold."""
    checkpoint, config, model = base
    unet = Lora({name: f for name, f in lora.layers.items() if name.startswith(UNET)})
    cloneofsimo.write_safetensors(tmp_path / "lora", cloneofsimo.from_lora(unet, model))
    to_list, old = (
        ["convert", tmp_path / "lora", tmp_path / "x.pt", "--to", "cloneofsimo-pt", "--config", config],
        b"old",
    )
    (tmp_path / "x.text_encoder.pt").write_bytes(old)
    add = ["lora_add", tmp_path / "lora", tmp_path / "lora", tmp_path / "x.pt", "--mode", "sum", "--config", config]
    for command in (to_list, [*add, "--format", "cloneofsimo-pt"]):
        with pytest.raises(InputError, match="x.text_encoder.pt exists"):
            run(*command)
        assert not (tmp_path / "x.pt").exists() and (tmp_path / "x.text_encoder.pt").read_bytes() == old
    run(*to_list, "--force")
    assert cloneofsimo.read_pt(tmp_path / "x.pt").factors.keys() == {"unet"}

    cloneofsimo.write_safetensors(
        tmp_path / "words", cloneofsimo.from_lora(Lora(unet.layers, {"<s1>": torch.randn(1, 24)}), model)
    )
    (tmp_path / "m.words.safetensors").write_bytes(old)
    upl = ["lora_add", checkpoint, tmp_path / "words", tmp_path / "m.ckpt", "--mode", "upl-ckpt-v2", "--config", config]
    with pytest.raises(InputError, match="m.words.safetensors exists"):
        run(*upl)
    assert not (tmp_path / "m.ckpt").exists() and (tmp_path / "m.words.safetensors").read_bytes() == old
    run(*upl, "--force")
    assert list(embeddings.read(tmp_path / "m.words.safetensors")) == ["<s1>"]

    custom_diffusion.write(tmp_path / "d.ckpt", tuned)
    (tmp_path / "webui" / "embeddings").mkdir(parents=True)
    (tmp_path / "webui" / "embeddings" / "<new1>.pt").write_bytes(old)
    with pytest.raises(InputError, match="<new1>.pt exists"):
        run("convert", "--mode", "compvis-to-webui", "--delta_ckpt", tmp_path / "d.ckpt", "--ckpt", checkpoint)
    assert not (tmp_path / "webui" / "model.ckpt").exists()


def test_lora_add_upl(base, lora, tmp_path):
    checkpoint, config, model = base
    lora = Lora(lora.layers, {"<s1>": torch.randn(1, 24)})
    cloneofsimo.write_safetensors(tmp_path / "lora.safetensors", cloneofsimo.from_lora(lora, model))
    args = [checkpoint, tmp_path / "lora.safetensors"]
    run("lora_add", *args, tmp_path / "m.ckpt", "--mode", "upl-ckpt-v2", "--alpha_1", 0.6, "--config", config)
    run("lora_add", *args, tmp_path / "folder", "--mode", "upl", "--alpha_1", 0.6, "--config", config)
    merged, folder, before = (
        read_weights(tmp_path / "m.ckpt"),
        diffusers_model.read_folder(tmp_path / "folder"),
        read_weights(checkpoint),
    )
    for name, value in folder.items():
        assert torch.equal(value, merged[name])
        changed = name.removesuffix(".weight") in lora.layers
        expected = before[name] + 0.6 * delta(lora.layers[name.removesuffix(".weight")]) if changed else before[name]
        assert_close_to(value, expected, 1e-3)
    assert list(embeddings.read(tmp_path / "m.words.safetensors")) == ["<s1>"]


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_lora_add_upl_takes_every_kind_that_is_trained_here(base, tmp_path, kind):
    pytest.importorskip("peft", reason="peft, which trains LoRA here, is not installed")
    from ldm.tuning import choose, files

    checkpoint, config, _ = base
    model = interchange_models.small_model(OmegaConf.load(config))
    params = {"kind": kind, "rank": 2, "targets": [UNET + "*.attn2.to_[kv]"]}
    chosen = choose({"target": "ldm.tuning.lora.LoRA", "params": params})
    chosen.family.install(model)
    model.tuning.families, model.is_tuned = [chosen], True
    generator = torch.Generator().manual_seed(2)
    for parameter in chosen.family.trainable(model).values():
        parameter.data = parameter.data + torch.randn(parameter.shape, generator=generator) * 0.3
    files.save(model, tmp_path / "own")
    expected = interchange_models.unet_output(model)
    with pytest.raises(InputError, match=f"{kind} is no low-rank sum"):
        run("convert", tmp_path / "own", tmp_path / "x", "--to", "kohya", "--config", config)
    more = ["--mode", "upl-ckpt-v2", "--alpha_1", 1, "--config", config]
    run("lora_add", checkpoint, tmp_path / "own", tmp_path / "m.safetensors", *more)
    merged = interchange_models.small_model(OmegaConf.load(config), seed=5)
    merged.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert_close_to(interchange_models.unet_output(merged), expected, 1e-4)
    with pytest.raises(InputError, match="position adapters, which cannot be folded"):
        run("lora_add", checkpoint, saved_adapter(tmp_path, 1), tmp_path / "y.ckpt", *more)


def test_lora_distill(base, lora, tmp_path):
    checkpoint, config, model = base
    weights = read_weights(checkpoint)
    tuned = {**weights, **{f"{name}.weight": weights[f"{name}.weight"] + delta(f) for name, f in lora.layers.items()}}
    torch.save({"state_dict": tuned}, tmp_path / "tuned.ckpt")
    more = ["--rank", 2, "--clamp_quantile", 1, "--device", "cpu", "--config", config]
    run("lora_distill", tmp_path / "tuned.ckpt", checkpoint, *more, "--save_path", tmp_path / "d", "--format", "kohya")
    found = lora_keys.read(tmp_path / "d", model)
    same(lora, Lora({name: found.layers[name] for name in lora.layers}), 1e-3)
    assert all(delta(f).abs().max() < 1e-6 for name, f in found.layers.items() if name not in lora.layers)
    with pytest.raises(InputError, match="exists"):
        run("lora_distill", tmp_path / "tuned.ckpt", checkpoint, *more, "--save_path", tmp_path / "d")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["a"], "expected path_1 path_2 output_path, by position or as --name value; got 1"),
        (["A", "C_rank2", "out"], "different ranks .4 and 2"),
        (["A", "A.pt", "out"], "two cloneofsimo files of one kind, got cloneofsimo, cloneofsimo-pt: use sum"),
        (["A", "A.pt", "out", "--mode", "sum"], "another base model"),
        (["A", "A", "A"], "A.safetensors exists"),
        (["A", "A", "out", "--mode", "sum", "--rank", "0"], "expected --rank >= 1, got 0"),
        (["A", "A", "out", "--mode", "sum", "--rank=-1"], "expected --rank >= 1, got -1"),
    ],
)
def test_lora_add_refuses(golden, tmp_path, args, message):
    files = {
        "A": golden / "lora/A.safetensors",
        "C_rank2": golden / "lora/C_rank2.safetensors",
        "A.pt": golden / "lora/A.pt",
    }
    with pytest.raises(InputError, match=message):
        run("lora_add", *(files.get(arg, tmp_path / arg if arg == "out" else arg) for arg in args))
    assert not (tmp_path / "out").exists()
