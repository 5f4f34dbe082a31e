"""The safety checker against diffusers' own, from a small folder made here; the watermark through its package."""

import json
import logging
import shutil

import imwatermark
import numpy as np
import pytest
import torch

from ldm.checkpoints import read_weights, save_safetensors
from ldm.commands import Program
from ldm.data.pictures import read_picture
from ldm.errors import InputError
from ldm.evaluate.safety import find_checker, load_checker
from ldm.evaluate.watermark import PUBLISHED, Watermark, find_watermark, read_watermark
from ldm.generate import to_pil
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small checker as diffusers writes it: it flags about half of all pictures."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "image_size": 32, "patch_size": 8, "projection_dim": 16}  # fmt: skip
    theirs = StableDiffusionSafetyChecker(CLIPConfig(vision_config=tower, projection_dim=16)).eval()
    for name in ("concept_embeds", "special_care_embeds"):
        getattr(theirs, name).data.normal_()
    theirs.concept_embeds_weights.data.fill_(0.45)
    theirs.special_care_embeds_weights.data.fill_(0.2)
    path = tmp_path_factory.mktemp("checker")
    theirs.save_pretrained(path)
    stored = {"size": {"shortest_edge": 32}, "crop_size": 32, "do_center_crop": True, "resample": 3,
              "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(stored))
    return path, theirs


def pictures(count):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return list(torch.nn.functional.interpolate(coarse, 32))


def test_flags_are_those_of_diffusers(folder):
    path, theirs = folder
    ours, shown = load_checker(path), pictures(40)
    pixels = torch.stack([ours.preprocessing(to_pil(picture)) for picture in shown])
    _, expected = theirs(clip_input=pixels, images=torch.ones(40, 1))
    with torch.no_grad():
        flags = ours.flagged(shown)
    assert flags == [bool(flag) for flag in expected] and 0 < sum(flags) < 40


def test_what_is_flagged_is_black(folder, caplog):
    caplog.set_level(logging.WARNING)
    ours, shown = load_checker(folder[0]), pictures(40)
    ours.head.concept_embeds_weights.data.fill_(-2.0)  # everything
    assert all(not one.any() for one in ours.checked(shown[:3]))
    assert "blanked 3 of 3 pictures" in caplog.text


def test_no_checker_is_said_once_and_a_wrong_one_refused(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.chdir(tmp_path)
    assert find_checker(None) is None and "pictures are not checked" in caplog.text
    assert find_checker("off") is None
    with pytest.raises(InputError, match="no safety checker in"):
        find_checker(str(tmp_path))


def test_a_watermark_is_read_again():
    """The published method loses a bit here and there, so that bits are counted."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 96, 96, generator=generator), 512, mode="bicubic")[0]
    picture = 0.1 + 0.8 * (picture - picture.min()) / (picture.max() - picture.min())
    marked = Watermark(PUBLISHED).marked(picture)
    assert right_bits(marked) > 0.95 > 0.7 > right_bits(picture)
    assert (marked - picture).abs().mean() < 0.02
    with pytest.raises(InputError, match="fewer than 256 x 256"):
        read_watermark(to_pil(picture[:, :100, :100]))


def right_bits(picture):
    decoder = imwatermark.WatermarkDecoder("bytes", 8 * len(PUBLISHED))
    found = decoder.decode(np.ascontiguousarray(np.array(to_pil(picture))[..., ::-1]), "dwtDct")
    assert read_watermark(to_pil(picture)) == bytes(found).decode("utf-8", errors="replace")
    wanted = np.unpackbits(np.frombuffer(PUBLISHED.encode(), np.uint8))
    return (np.unpackbits(np.frombuffer(bytes(found), np.uint8)) == wanted).mean()


def test_small_pictures_have_no_room(caplog):
    caplog.set_level(logging.INFO)
    mark, picture = find_watermark(None), torch.rand(3, 64, 64)
    assert mark.marked(picture) is picture and mark.marked(picture) is picture
    assert caplog.text.count("no watermark") == 1 and find_watermark("off") is None


@pytest.mark.slow
def test_the_program_blanks_and_says_so(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    strict = tmp_path / "strict"
    shutil.copytree(folder[0], strict)
    weights = dict(read_weights(strict / "model.safetensors"))
    weights["concept_embeds_weights"] = torch.full((17,), -2.0)  # everything is flagged
    (strict / "model.safetensors").unlink()
    save_safetensors(strict / "model.safetensors", {name: value.clone() for name, value in weights.items()})
    words = ["--config", str(ROOT / "configs/sd-mini/inference.yaml"), "--ddim_steps", "2", "--device", "cpu"]
    Program("txt2img")([*words, "--prompt", "a cat", "--n_iter", "1", "--outdir", str(tmp_path / "out"),
                        "--safety_checker", str(strict), "--skip_grid"])  # fmt: skip
    drawn = sorted((tmp_path / "out" / "samples").glob("*.png"))
    assert len(drawn) == 3 and all(read_picture(path).getbbox() is None for path in drawn)
    assert "blanked 3 of 3 pictures" in caplog.text and "no watermark: pictures need at least" in caplog.text
