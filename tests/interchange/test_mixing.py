"""Sums of whole checkpoints against the same sums in memory, and how much memory they take."""

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import streamed
from ldm.commands import Program
from ldm.errors import InputError
from ldm.interchange import mixing

torch.set_num_threads(1)
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


def checkpoint(path, seed, channels=4, dtype=torch.float32, **more):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        FIRST: torch.randn(8, channels, 3, 3, generator=generator).to(dtype),
        "model.diffusion_model.out.2.weight": torch.randn(4, 8, generator=generator).to(dtype),
        "first_stage_model.encoder.conv_in.bias": torch.randn(5, generator=generator).to(dtype),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(seed, seed + 7),
        **more,
    }
    (save_file if path.suffix == ".safetensors" else torch.save)(weights, path)
    return weights


def mix(*words):
    Program("mix")([str(word) for word in words])


def test_a_weighted_sum(tmp_path, capsys):
    own = {"own": torch.ones(3)}
    a = checkpoint(tmp_path / "a.safetensors", 1, dtype=torch.float16, **own)
    b, c = checkpoint(tmp_path / "b.ckpt", 2), checkpoint(tmp_path / "c.safetensors", 3)
    paths = [tmp_path / name for name in ("a.safetensors", "b.ckpt", "c.safetensors")]
    mix(*paths, "--weights", 0.5, 0.75, -0.25, "--out", tmp_path / "x.safetensors")
    assert "1 tensors are the first model's alone, e.g. own" in capsys.readouterr().out
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == a.keys()
    for name, value in found.items():
        if name == "own" or not value.is_floating_point():
            assert torch.equal(value, a[name])
        else:
            assert torch.equal(value, (0.5 * a[name].float() + 0.75 * b[name] - 0.25 * c[name]).half())
    mix(*paths[1:], "--out", tmp_path / "y.safetensors", "--precision", "bf16")
    assert torch.equal(load_file(tmp_path / "y.safetensors")[FIRST], (0.5 * b[FIRST] + 0.5 * c[FIRST]).bfloat16())


def test_a_difference_into_an_inpainting_model(tmp_path, capsys):
    a = checkpoint(tmp_path / "a.safetensors", 1, channels=9)
    b, c = checkpoint(tmp_path / "b.safetensors", 2), checkpoint(tmp_path / "c.safetensors", 3)
    more = ["--add", tmp_path / "b.safetensors", "--subtract", tmp_path / "c.safetensors"]
    mix(tmp_path / "a.safetensors", *more, "--strength", 0.5, "--out", tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    for name, value in found.items():
        expected = a[name].clone()
        if name == FIRST:
            expected[:, :4] += 0.5 * (b[name] - c[name])
        elif value.is_floating_point():
            expected += 0.5 * (b[name] - c[name])
        assert torch.allclose(value, expected, atol=1e-6)
    with pytest.raises(InputError, match=r"a.safetensors is another model than .*b.safetensors: .*\[8, 9, 3, 3\]"):
        mix(tmp_path / "b.safetensors", tmp_path / "a.safetensors", "--out", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "b", "--weights", 0.7, 0.7], "--weights have the sum 1.4; expected 1"),
        (["a", "b", "--weights", 1], "1 --weights for 2 models"),
        (["a"], "expected two models or more, or one with --add and --subtract"),
        (["a", "--add", "b"], "--add and --subtract belong together"),
        (["a", "b", "--add", "b", "--subtract", "a"], "change one model, without --weights; got 2"),
        (["a", "."], "is a folder; expected a checkpoint: ldm convert . OUT --to checkpoint"),
        (["a", "lora"], "lora.safetensors holds no UNet"),
        (["a", "bad"], "the sum of .* is not finite; get undamaged copies"),
    ],
)
def test_refusals(tmp_path, words, message):
    checkpoint(tmp_path / "a.safetensors", 1)
    checkpoint(tmp_path / "b.safetensors", 2)
    checkpoint(tmp_path / "bad.safetensors", 2, **{FIRST: torch.full((8, 4, 3, 3), float("inf"))})
    save_file({"lora_unet_x.lora_up.weight": torch.ones(1)}, tmp_path / "lora.safetensors")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b", "bad", "lora")}
    with pytest.raises(InputError, match=message):
        mix(*(files.get(word, word) for word in words), "--out", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def anonymous_memory():
    """Bytes of this process that are not mapped from files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process its memory")
def test_memory_stays_below_a_model(tmp_path):
    """Three models of 64 MB: at no tensor does the process hold as much as half of one more than at the start."""
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for number, path in enumerate(paths):
        save_file(
            {f"{FIRST}{i}": torch.full((2**20,), float(number)) for i in range(16)} | {FIRST: torch.ones(1)}, path
        )
    gc.collect()
    sources, start, highest = mixing.opened(paths, [1.0, 0.5, -0.5]), anonymous_memory(), 0

    def watched(names):
        nonlocal highest
        for name in names:
            yield name
            highest = max(highest, anonymous_memory())

    mixing.write(tmp_path / "x.safetensors", sources, progress=watched)
    assert torch.equal(load_file(tmp_path / "x.safetensors")[FIRST + "3"][:2], torch.tensor([-0.5, -0.5]))
    assert highest and highest - start < 32 * 2**20


def test_a_streamed_file_is_what_safetensors_writes(tmp_path):
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {f"t{i}": torch.arange(6).reshape(2, 3).to(dtype) for i, dtype in enumerate(kinds)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    described = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    streamed.write(tmp_path / "x", described, tensors.__getitem__, {"format": "pt"})
    found = load_file(tmp_path / "x")
    assert all(found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in tensors.items())
