"""Random changes of pictures: what they do, that a draw repeats them, and what is cached nevertheless."""

import logging

import pytest
import torch
from kornia.color import rgb_to_hsv
from PIL import Image

from ldm.data.augment import Colours
from ldm.data.folder import CaptionedFolder
from ldm.data.pictures import region
from ldm.errors import InputError
from tests.data.test_buckets import QUIET, sets
from tests.runs import differences, last, pictures, resume, train


def changed(pixels: torch.Tensor, number: int = 60, **settings) -> torch.Tensor:
    change = Colours(settings)
    return torch.stack([change(pixels, torch.Generator().manual_seed(k)) for k in range(number)])


@pytest.fixture
def pixels():
    colours = torch.tensor([[200, 90, 60], [60, 130, 90], [90, 90, 170]], dtype=torch.uint8)
    return colours.T[:, None].repeat(1, 2, 1)  # 3 2 3


def test_colours_change_within_their_bounds(pixels):
    plain = pixels.float()
    assert torch.allclose(changed(pixels, 3), plain.expand(3, *plain.shape), atol=0.01)
    moved = changed(pixels, brightness=0.1) - plain
    assert moved.abs().max() <= 25.6 and moved.min() < -20 and moved.max() > 20
    assert torch.allclose(moved, moved[:, :1, :1, :1].expand_as(moved), atol=0.01)  # the same everywhere
    ratio = changed(pixels, contrast=0.2) / plain
    assert 0.79 < ratio.min() < 0.85 and 1.15 < ratio.max() < 1.21
    hues, hue = rgb_to_hsv(changed(pixels, hue=0.02) / 255)[:, 0], rgb_to_hsv(plain[None] / 255)[:, 0]
    turned = (hues - hue + torch.pi) % (2 * torch.pi) - torch.pi
    assert 0.1 < turned.abs().max() <= 0.02 * 2 * torch.pi + 1e-4
    dull, bright = (rgb_to_hsv(changed(pixels, saturation=0.5) / 255)[:, 1].amax((1, 2)).aminmax())
    assert dull < 0.5 < 0.9 < bright
    grey = changed(pixels, 200, grey=0.3)
    share = (grey[:, 0] == grey[:, 1]).flatten(1).all(1).float().mean()
    assert abs(share - 0.3) < 0.1


def test_a_zoom_shows_a_smaller_part():
    assert region(100, 200, (64, 64), (0.0, 1.0), 2.0) == (0, 150, 50, 50)
    assert region(100, 200, (64, 64), (0.5, 0.5), 1.0) == (0, 50, 100, 100)


def test_a_draw_repeats_its_changes(tmp_path):
    folder = pictures(tmp_path / "photos", 3)
    augment = {"brightness": 0.2, "hue": 0.05, "zoom": 1.5}
    one, two = (CaptionedFolder(folder, size=16, captions="filename", repeats=5, augment=augment) for _ in range(2))
    items = [one.sample(k)["image"] for k in range(15)]
    assert all(torch.equal(two.sample(k)["image"], items[k]) for k in reversed(range(15)))
    assert len({item.numpy().tobytes() for item in items}) == 15
    assert one.why_not_cached == "zoom and augment, at each draw anew"
    plain = CaptionedFolder(folder, size=16, captions="filename", set="val")
    val = CaptionedFolder(folder, size=16, captions="filename", set="val", augment=augment)
    assert torch.equal(val.sample(0)["image"], plain.sample(0)["image"]) and val.why_not_cached is None


def test_a_part_of_a_squeezed_picture_keeps_its_shape(tmp_path):
    Image.new("RGB", (80, 40)).save(tmp_path / "0.png")
    data = CaptionedFolder(tmp_path, size=16, captions="filename", crop="none", augment={"zoom": 2}, repeats=20)
    for k in range(10):
        _, _, height, width = data.parts[0]._region(0, data.parts[0]._place(k))
        assert 20 <= height <= 40 and abs(width - 2 * height) <= 1


@pytest.mark.parametrize(
    "settings, message",
    [({"brightnes": 0.1}, "augment.brightnes is unknown; did you mean brightness"),
     ({"zoom": 0.5}, "augment.zoom must be a number of at least 1, got 0.5")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        CaptionedFolder(pictures(tmp_path / "photos", 1), size=16, captions="filename", augment=settings)


@pytest.mark.slow
def test_a_run_with_changes_says_so_and_resumes(tmp_path, caplog):
    words = [*sets("train", captions="filename", augment="{contrast: 0.2}"), "data.params.reg=null", *QUIET]
    with caplog.at_level(logging.INFO):
        whole = train(tmp_path, "whole", "--max_steps", 5, *words)
    assert "pictures are encoded in every step, captions only once: augment, at each draw anew" in caplog.text
    part = train(tmp_path, "part", "--max_steps", 4, *words)
    resume(part, "--max_steps", "5")
    assert differences(last(whole)["state_dict"], last(part)["state_dict"]) == []
