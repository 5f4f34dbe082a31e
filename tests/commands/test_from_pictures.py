"""Sampling that begins at pictures, masks, negative prompts, grids, long and weighted prompts: the programs."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.commands import Program
from ldm.errors import InputError
from tests import runs
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
MINI = ["--config", str(ROOT / "configs/sd-mini/inference.yaml"), "--ddim_steps", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A picture of 70 x 90 pixels, left half red, right half blue."""
    pixels = np.zeros((70, 90, 3), np.uint8)
    pixels[:, :45, 0], pixels[:, 45:, 2] = 230, 230
    path = tmp_path_factory.mktemp("photos") / "flag.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def mask(photo):
    pixels = np.zeros((70, 90), np.uint8)
    pixels[:, :45] = 255
    path = photo.with_name("flag_mask.png")
    Image.fromarray(pixels).save(path)
    return path


def drawn(verb, folder, *words, count=1):
    Program(verb)([*MINI, "--outdir", str(folder), "--n_iter", "1", *map(str, words)])
    files = sorted((folder / "samples").glob("*.png"))
    assert len(files) == count
    return [runs.pixels(path).float() / 255 for path in files]


def test_strength_leads_away_from_the_picture(photo, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    begun = [drawn("sample", tmp_path / str(s), "--prompt", "a cat", "--init-img", photo, "--strength", s)[0]
             for s in (0.25, 1.0)]  # fmt: skip
    plain = drawn("sample", tmp_path / "plain", "--prompt", "a cat", "--H", 64, "--W", 80)[0]
    assert begun[0].shape == (3, 64, 80) or begun[0].shape == (64, 80, 3)
    flag = torch.from_numpy(np.array(Image.open(photo).resize((80, 64)))).float() / 255
    near, far = ((as_hwc(one) - flag).abs().mean().item() for one in begun)
    assert near < far and torch.equal(begun[1], plain)  # at strength 1 nothing of the picture is left
    assert "70 x 90 pixels, resized to 64 x 80" in caplog.text


def as_hwc(picture):
    return picture.permute(1, 2, 0) if picture.shape[0] == 3 else picture


def test_img2img_has_the_published_defaults(photo, tmp_path):
    with pytest.raises(InputError, match="--init-img is missing"):
        Program("img2img")(MINI)
    pictures = drawn("img2img", tmp_path, "--prompt", "a cat", "--init-img", photo, "--skip_grid", count=2)
    assert not torch.equal(*pictures) and not list(tmp_path.glob("grid*"))


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm_solver", "euler_a"])
def test_only_what_is_white_is_painted(photo, mask, tmp_path, sampler):
    words = ["--prompt", "a cat", "--init-img", photo, "--mask", mask, "--sampler", sampler]
    found = as_hwc(drawn("sample", tmp_path / sampler, *words)[0])
    flag = torch.from_numpy(np.array(Image.open(photo).resize((80, 64), Image.Resampling.LANCZOS))).float() / 255
    assert (found[:, 41:] - flag[:, 41:]).abs().max() < 1 / 254
    assert (found[:, :38] - flag[:, :38]).abs().mean() > 0.02


def test_a_folder_is_inpainted(photo, mask, tmp_path, capsys):
    Program("inpaint")([*MINI, "--indir", str(photo.parent), "--outdir", str(tmp_path), "--steps", "3"])
    assert "flag.png where flag_mask.png is white" in capsys.readouterr().out
    assert Image.open(tmp_path / "flag.png").size == (80, 64)
    words = ["--init-img", str(photo), "--mask", str(mask), "--outdir", str(tmp_path / "one"), "--steps", "3"]
    Program("inpaint")([*MINI, *words])
    assert len(list((tmp_path / "one" / "samples").glob("*.png"))) == 1
    with pytest.raises(InputError, match="--init-img is for one picture"):
        Program("inpaint")([*MINI, *words, "--indir", str(photo.parent)])
    mask_alone = tmp_path / "alone"
    mask_alone.mkdir()
    (mask_alone / "x_mask.png").write_bytes(mask.read_bytes())
    with pytest.raises(InputError, match="x_mask.png has no picture: x.png is missing"):
        Program("inpaint")([*MINI, "--indir", str(mask_alone), "--outdir", str(tmp_path)])


def test_a_negative_prompt_changes_what_is_drawn(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na cat --n red\n")
    plain, other = drawn("sample", tmp_path / "file", "--from-file", file, "--seed", 3, "--fixed_code", count=2)
    [again] = drawn("sample", tmp_path / "word", "--prompt", "a cat", "--negative_prompt", "red", "--seed", 3)
    assert torch.equal(other, again) and not torch.equal(plain, other)


def test_grids_compare_scales_and_prompts(tmp_path, capsys):
    words = ["--prompt", "a cat", "--prompt", "a dog", "--scale", 1, 7.5]
    pictures = drawn("sample", tmp_path, *words, "--fixed_code", count=4)
    (grid,) = tmp_path.glob("grid-*.png")
    head = Image.open(grid).convert("L").crop((0, 0, 2 * 70, 14))  # the prompts above their columns
    assert all(head.crop((x, 0, x + 70, 14)).getextrema()[0] < 128 for x in (0, 70))
    assert Image.open(grid).size[1] > 2 * 64 and not torch.equal(pictures[0], pictures[2])
    assert "seed 42, scale 7.5" in capsys.readouterr().out


def test_long_prompts_are_seen_whole(tmp_path):
    begin = "a cat " + "very " * 60  # SD-mini's text encoder has 32 places
    ends = [drawn("sample", tmp_path / end, "--prompt", begin + end)[0] for end in ("red", "blue")]
    assert not torch.equal(*ends)


def test_weights_act(tmp_path):
    def one(name, prompt, *more):
        return drawn("sample", tmp_path / name, "--prompt", prompt, *more)[0]

    plain, heavy = one("plain", "a red cat"), one("heavy", "a (red:1.6) cat", "--prompt_weights")
    same, literal = one("same", "a (red:1.0) cat", "--prompt_weights"), one("literal", "a (red:1.6) cat")
    assert torch.equal(plain, same) and not torch.equal(plain, heavy) and not torch.equal(plain, literal)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "x.png"], "--mask needs a picture to begin at"),
        (["--strength", "0.5"], "--strength needs a picture to begin at"),
        (["--init-img", "{photo}", "--strength", "1.5"], "strength must be from 0 to 1, got 1.5"),
        (["--init-img", "{photo}", "--strength", "0.1"], "leaves none to make"),
    ],
)
def test_what_is_refused(photo, tmp_path, words, message):
    with pytest.raises(InputError, match=message):
        drawn("sample", tmp_path, *(word.format(photo=photo) for word in words))
