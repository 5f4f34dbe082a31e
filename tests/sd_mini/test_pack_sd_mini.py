"""scripts/sd_mini/pack.py writes weights that fit, and refuses others before anything is overwritten."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from ldm.config import find_file
from ldm.errors import InputError
from scripts.sd_mini.pack import averaged_unet, main


def pack(work, *words):
    main([str(word) for word in [*words, "--out", work / "out"]])


def test_both_towers_of_clip_are_written_in_half_precision(tmp_path):
    towers = CLIPModel(CLIPConfig.from_pretrained(find_file("models/sd-mini/clip"))).state_dict()
    save_file({f"clip.{name}": value.clone() for name, value in towers.items()}, tmp_path / "last.safetensors")
    pack(tmp_path, "--clip", tmp_path / "last.safetensors")
    written = load_file(tmp_path / "out/clip/model.safetensors")
    assert written.keys() == towers.keys()
    assert all(torch.equal(written[name], value.half()) for name, value in towers.items() if value.is_floating_point())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clip", "{other}"], "--clip .*other.safetensors does not fit this config: it lacks"),
        (["--clip", "{other}", "--autoencoder", "{other}"], "--autoencoder and --ldm together"),
        (["--ldm", "{other}"], "--autoencoder and --ldm together"),
        (["--autoencoder", "{other}", "--ldm", "{other}"], "1 averages are not in it, e.g. model_ema"),
        ([], "name checkpoints with --clip"),
    ],
)
def test_refusals(tmp_path, words, message):
    save_file({"model.diffusion_model.out": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=message):
        pack(tmp_path, *(word.format(other=tmp_path / "other.safetensors") for word in words))
    assert not (tmp_path / "out").exists()


def test_averages_take_the_names_of_what_they_average():
    average = torch.ones(2)
    weights = {"model.diffusion_model.out.0.weight": 2 * average, "model_ema.diffusion_modelout0weight": average}
    assert averaged_unet(weights) == {"model.diffusion_model.out.0.weight": average}
