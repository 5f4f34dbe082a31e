"""Every program that writes, where it cannot: one line that names the path, nothing half-written, nothing lost."""

import hashlib

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import save_torch
from ldm.errors import InputError
from ldm.interchange import cloneofsimo, custom_diffusion, lora_keys
from tests.data.test_latents import config as latents_config
from tests.interchange_models import run
from tests.modules.test_position_sums import saved as saved_adapter
from tests.runs import TINY, pictures
from tests.test_writing import files_of_at_most

pytestmark = pytest.mark.slow

NO_FOLDER = "file/in"  # below a file, where no folder can be


@pytest.fixture(scope="module")
def inputs(base, lora, tmp_path_factory):
    """What the programs read."""
    folder = tmp_path_factory.mktemp("inputs")
    checkpoint, config, model = base
    delta = custom_diffusion.Delta(
        {n: v + 0.1 for n, v in model.state_dict().items() if custom_diffusion.COMPRESSED.search(n)},
        {"<new1>": torch.ones(1, 24)},
    )
    custom_diffusion.write(folder / "delta.ckpt", delta)
    changed = {n: v + torch.rand(v.shape) if v.is_floating_point() else v for n, v in model.state_dict().items()}
    save_torch(folder / "tuned.ckpt", changed)
    torch.save({"string_to_param": {"<a>": torch.ones(300, 24), "<b>": torch.ones(300, 24)}}, folder / "words.pt")
    for name in "ab":
        lora_keys.write_kohya(folder / f"{name}.safetensors", lora, model)
        cloneofsimo.write_pt(folder / f"{name}.pt", cloneofsimo.from_lora(lora, model))
    (folder / "captions.txt").write_text("a photo of a dog on the beach\n" * 3)
    (folder / "checkpoints").mkdir()
    save_torch(folder / "checkpoints" / "last.ckpt", {"state_dict": model.state_dict()})
    pictures(folder / "photos", 2)
    return folder


def latents(inputs, out):
    file = inputs / "latents.yaml"
    config = latents_config(inputs)
    if not file.exists():
        OmegaConf.save(config, file)
        from ldm.config import instantiate_from_config

        save_torch(inputs / "autoencoder.ckpt", {"state_dict": instantiate_from_config(config.model).state_dict()})
    return ["cache_latents", "--config", file, "--ckpt", inputs / "autoencoder.ckpt", "--out", out, "--draws", 7,
            "--batch_size", 7, "--device", "cpu"]  # fmt: skip


# Each a program, its command line after the inputs `i`, the base (checkpoint, config, ...) `b`, and the output `o`.
PROGRAMS = {
    "convert to one file": lambda i, b, o: [
        "convert", i / "a.safetensors", o, "--to", "cloneofsimo", "--config", b[1], "--force",
    ],
    "convert to two files": lambda i, b, o: [
        "convert", i / "a.safetensors", o, "--to", "cloneofsimo-pt", "--config", b[1], "--force",
    ],
    "convert to a folder": lambda i, b, o: [
        "convert", b[0], o, "--to", "diffusers-model", "--config", b[1], "--force",
    ],
    "convert to words": lambda i, b, o: ["convert", i / "words.pt", o, "--to", "words", "--force"],
    "merge_adapters": lambda i, b, o: ["merge_adapters", saved_adapter(i, 1), "--weights", 0.5, "--out", o, "--force"],
    "compose": lambda i, b, o: [
        "compose", "--paths", f"{i / 'delta.ckpt'}+{i / 'delta.ckpt'}", "--categories", "cat+pot", "--ckpt", b[0],
        "--config", b[1], "--save_path", o, "--device", "cpu", "--regularization_prompt", i / "captions.txt", "--force",
    ],
    "lora_add of lists": lambda i, b, o: [
        "lora_add", i / "a.pt", i / "b.pt", o, "--with_text_lora=True", "--force",
    ],
    "lora_add into a model": lambda i, b, o: [
        "lora_add", b[0], i / "a.safetensors", o, "--mode", "upl-ckpt-v2", "--config", b[1], "--force",
    ],
    "lora_add into a folder": lambda i, b, o: [
        "lora_add", b[0], i / "a.safetensors", o, "--mode", "upl", "--config", b[1], "--force",
    ],
    "lora_distill": lambda i, b, o: [
        "lora_distill", i / "tuned.ckpt", b[0], "--config", b[1], "--save_path", o, "--format", "kohya", "--force",
        "--rank", 4, "--device", "cpu",
    ],
    "cache_latents": lambda i, b, o: latents(i, o),
    "before_after": lambda i, b, o: [
        "before_after", "--config", TINY, "--adapter_path", TUNED[0], "--data_root", i / "photos", "--class_word",
        "dog", "--columns", 2, "--steps", 1, "--device", "cpu", "--out", o,
    ],
    "sample": lambda i, b, o: [
        "sample", "--config", TINY, "--outdir", o, "--ddim_steps", 1, "--n_iter", 1, "--n_samples", 2, "--device",
        "cpu",
    ],
}  # fmt: skip
TUNED = []  # a folder of the tiny model's adapters


@pytest.fixture(scope="module", autouse=True)
def adapters(tmp_path_factory):
    from ldm.tuning import files
    from tests.runs import tiny_model

    TUNED[:] = [tmp_path_factory.mktemp("tuned") / "1-adapters"]
    files.save(tiny_model(), TUNED[0])


def call(words):
    if words[0] == "sample":
        from sample import main

        return main([str(word) for word in words[1:]])
    return run(*words)


def content(folder):
    """What is in a folder, hidden files included."""
    found = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_where_nothing_can_be_written(inputs, base, tmp_path, name):
    (tmp_path / "file").write_text("mine")
    output = tmp_path / NO_FOLDER / "out"
    with pytest.raises(InputError, match="cannot be written: .*is a file, not a folder") as refused:
        call(PROGRAMS[name](inputs, base, output))
    assert str(output) in str(refused.value) and "\n" not in str(refused.value)
    assert content(tmp_path) == {"file": hashlib.sha256(b"mine").hexdigest()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_on_a_full_disk(inputs, base, tmp_path, name, capsys):
    """`capsys`: what programs say is not written to a file, which could not grow either."""
    words = PROGRAMS[name](inputs, base, tmp_path / "out")
    with files_of_at_most(1000), pytest.raises(InputError, match="cannot be written: ") as refused:
        call(words)
    assert str(tmp_path / "out") in str(refused.value) and "\n" not in str(refused.value)
    assert content(tmp_path) == {}
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name.startswith(("convert", "merge", "compose"))])
def test_what_was_there_stays(inputs, base, tmp_path, name, capsys):
    words = PROGRAMS[name](inputs, base, tmp_path / "out")
    call(words)
    before = content(tmp_path)
    assert before
    with files_of_at_most(1000), pytest.raises(InputError, match="cannot be written: .*what was there is unchanged"):
        call(words)
    assert content(tmp_path) == before


BESIDE = {
    "compress": lambda f, b: ["compress", "--delta_ckpt", f / "delta.ckpt", "--ckpt", b[0], "--force"],
    "convert --mode": lambda f, b: [
        "convert", "--mode", "compvis-to-diffuser", "--delta_ckpt", f / "delta.ckpt", "--ckpt", b[0], "--config", b[1],
        "--force",
    ],
    "get_deltas": lambda f, b: ["get_deltas", "--path", f / "checkpoints", "--force"],
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_programs_that_write_beside_what_they_read(inputs, base, tmp_path, name, capsys):
    for file in ("delta.ckpt", "checkpoints/last.ckpt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes((inputs / file).read_bytes())
    before = content(tmp_path)
    with files_of_at_most(1000), pytest.raises(InputError, match="cannot be written: ") as refused:
        call(BESIDE[name](tmp_path, base))
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)
    assert content(tmp_path) == before
