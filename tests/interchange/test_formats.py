"""The table of formats, and one more row in it, which every command then knows."""

import subprocess
import sys

import pytest
import torch

from ldm.checkpoints import save_safetensors
from ldm.commands import Program
from ldm.errors import InputError
from ldm.interchange import formats, identify, load_any, lora_keys
from ldm.interchange.contents import CONTENTS
from ldm.interchange.formats import FORMATS, Codec, Context, Format, by_name
from ldm.interchange.inspection import describe
from ldm.interchange.lora import Factors, Lora
from tests import interchange_models
from tests.helpers import assert_close_to
from tests.interchange.test_lora_keys import random_lora, same
from tests.runs import ENVIRONMENT

torch.set_num_threads(1)


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_a_row_and_its_codec_agree(row):
    assert set(row.holds) == set(row.codec.reads) <= set(CONTENTS)
    assert (row.codec.write is None) == bool(row.not_written)


def test_names_are_distinct():
    assert len({row.name for row in FORMATS}) == len(FORMATS)


def test_the_table_needs_no_torch():
    """Command lines list the rows at once."""
    code = "import sys, ldm.interchange.formats, ldm.models.bases; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


# A made-up format: `down|<layer>` and `up|<layer>` with LDM's names, the scale in the metadata.


def read(file, context):
    names = [name.removeprefix("up|") for name in file.content if name.startswith("up|")]
    scale = float(file.metadata["scale"])
    return Lora({name: Factors(file.content[f"down|{name}"], file.content[f"up|{name}"], scale) for name in names})


def write(path, lora, context):
    [scale] = {factors.scale for factors in lora.layers.values()}
    pairs = ((f"{role}|{name}", getattr(f, role)) for name, f in lora.layers.items() for role in ("up", "down"))
    save_safetensors(path, dict(pairs), {"made up": "yes", "scale": str(scale)})


MADE_UP = Codec(lambda file: "made up" in file.metadata, {"lora": read}, write)


@pytest.fixture
def made_up():
    FORMATS.append(row := Format("made-up", "a LoRA of a made-up format", f"{__name__}.MADE_UP", ("lora",)))
    yield row
    FORMATS.remove(row)


@pytest.mark.slow
def test_one_more_format(made_up, config, tmp_path, capsys):
    model, other = (interchange_models.small_model(config) for _ in range(2))
    lora = random_lora(model, ["attn2"])
    scale = next(iter(lora.layers.values())).scale
    lora = Lora({name: factors._replace(scale=scale) for name, factors in lora.layers.items()})
    write(tmp_path / "one", lora, Context())
    lora_keys.write_kohya(tmp_path / "two", lora, model)
    assert identify(tmp_path / "one") == "made-up"
    found = describe(tmp_path / "one")
    assert (found["kind"], found["what"], found["layers"]) == ("made-up", made_up.title, len(lora.layers))
    load_any(model, tmp_path / "one", 0.7)
    load_any(other, tmp_path / "two", 0.7)
    plain = interchange_models.unet_output(interchange_models.small_model(config))
    expected = interchange_models.unet_output(other)
    assert (expected - plain).norm() > 0.01 * plain.norm()
    assert_close_to(interchange_models.unet_output(model), expected, 1e-5)
    # from it and to it, and among the choices of every command that writes LoRAs
    settings = ["--config", str(write_config(config, tmp_path))]
    for source, target, kind in (("one", "three", "kohya"), ("two", "four", "made-up")):
        Program("convert")([str(tmp_path / source), str(tmp_path / target), "--to", kind, *settings])
        assert identify(tmp_path / target) == kind
    same(lora_keys.read(tmp_path / "three", other), lora)
    same(made_up.read("lora", formats.open_file(tmp_path / "four")), lora)
    with pytest.raises(InputError, match=f"one is {made_up.title}: it cannot become delta"):
        Program("convert")([str(tmp_path / "one"), str(tmp_path / "five"), "--to", "delta", *settings])
    for verb in ("distill", "lora-add"):
        assert "made-up" in Program(verb).parser().format_help()
    capsys.readouterr()


def write_config(config, folder):
    from omegaconf import OmegaConf

    OmegaConf.save(config, folder / "model.yaml")
    return folder / "model.yaml"


def test_a_file_is_opened_once(config, tmp_path, monkeypatch):
    """Whatever asks what a file is and what it holds reads one opening of it."""
    from ldm import checkpoints

    model = interchange_models.small_model(config)
    lora_keys.write_kohya(tmp_path / "lora", random_lora(model, ["attn2"]), model)
    opened = []
    original = checkpoints.read_object
    monkeypatch.setattr(checkpoints, "read_object", lambda path: opened.append(path) or original(path))
    load_any(model, tmp_path / "lora")
    describe(tmp_path / "lora")
    assert opened == [tmp_path / "lora"] * 2


def test_what_is_not_written():
    assert "adapter" not in formats.written() and set(formats.written("lora")) == {
        "cloneofsimo", "cloneofsimo-pt", "comfyui", "diffusers", "kohya", "peft",
    }  # fmt: skip
    assert by_name("adapter").not_written
