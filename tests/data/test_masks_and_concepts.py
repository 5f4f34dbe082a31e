"""Masks that weigh the loss, and several folders with settings of their own."""

import logging
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data import loss_masks
from ldm.data.dreambooth import PersonalizedBase
from ldm.data.folder import CaptionedFolder
from ldm.errors import InputError
from ldm.models.diffusion.losses import simple_loss
from ldm.models.diffusion.training import mask_of
from tests.data.test_buckets import QUIET, sets
from tests.runs import TINY, differences, last, main_dream_booth, pictures, resume, train


def left(size=(40, 36)) -> Image.Image:
    """White in the left half."""
    mask = np.zeros(size[::-1], np.uint8)
    mask[:, : size[0] // 2] = 255
    return Image.fromarray(mask)


@pytest.fixture
def folder(tmp_path):
    """Three pictures: 0 has a mask beside it, 1 one in mask/, 2 an alpha channel."""
    root = pictures(tmp_path / "photos", 3)
    left().save(root / "0-masklabel.png")
    (root / "mask").mkdir()
    left((80, 72)).save(root / "mask" / "1.png")
    picture = Image.open(root / "2.png")
    picture.putalpha(left())
    picture.save(root / "2.png")
    return root


def masked(folder, masks, **more) -> CaptionedFolder:
    return CaptionedFolder(folder, **{"size": 32, "captions": "filename", "set": "val", "masks": masks, **more})


@pytest.fixture
def said(caplog):
    loss_masks._tell.cache_clear()
    with caplog.at_level(logging.INFO):
        yield lambda: [record.getMessage() for record in caplog.records]


def test_masks_of_three_sources(folder, said):
    data = masked(folder, {"source": "auto", "rest": 0.25})
    assert [path.name for path in data.paths] == ["0.png", "1.png", "2.png"]
    for k in range(3):
        weights = data.sample(k)["loss_mask"]
        assert weights.shape == (32, 32)
        assert weights[:, :14].min() == 1 and weights[:, -14:].max() == 0.25
    assert f"{folder}: 3 pictures, 3 masks" in said() and not any("skipped" in line for line in said())


@pytest.mark.parametrize("source, number", [("label", 0), ("folder", 1), ("alpha", 2)])
def test_one_source_alone(folder, source, number, said):
    data = masked(folder, source)
    full = [bool((data.sample(k)["loss_mask"] == 1).all()) for k in range(3)]
    assert full == [k != number for k in range(3)]
    without = ", ".join(f"{k}.png" for k in range(3) if k != number)
    assert f"{folder}: 2 pictures without a mask count everywhere: {without}" in said()


def test_a_mask_is_flipped_and_cropped_like_its_picture(folder):
    Image.new("RGB", (40, 36)).save(folder / "0.png")
    picture = Image.open(folder / "0.png")
    picture.paste("white", (0, 0, 20, 36))  # the picture is its own mask
    picture.save(folder / "0.png")
    for more in ({"buckets": {"step": 8}}, {"crop": "random"}, {"crop": "none"}, {}):
        data = masked(folder, {"rest": 0}, set="train", repeats=9, interpolation="bilinear", **more)
        items = [data.sample(k) for k in range(27) if data.choose(k).number == 0]
        assert len({data.choose(k).flipped for k in range(27) if data.choose(k).number == 0}) == 2
        for item in items:
            shown = (item["image"][..., 0] + 1) / 2
            assert shown.shape == item["loss_mask"].shape and (shown - item["loss_mask"]).abs().max() < 0.02


def test_masks_are_never_shown_as_pictures(folder, said):
    data = PersonalizedBase(folder, size=8, class_word="dog")
    assert len(data.paths) == 3
    assert any("skipped 2 that are not pictures: 0-masklabel.png, mask" in line for line in said())


def test_a_weighted_loss():
    torch.manual_seed(0)
    one, two = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    mask = torch.zeros(2, 16, 16)
    mask[0, :, :6] = 1
    mask[1] = 0.5
    weights = mask_of({"loss_mask": mask}, (4, 4))
    assert weights.shape == (2, 1, 4, 4) and weights[0, 0, 0].tolist() == [1, 0.5, 0, 0]
    errors = (one - two) ** 2
    expected = (errors[0] * weights[0]).sum() / (4 * weights[0].sum()), errors[1].mean()
    assert torch.allclose(simple_loss(one, two, mask=weights), torch.stack(expected))
    assert simple_loss(one, two, mask=torch.zeros(2, 1, 4, 4)).tolist() == [0, 0]  # not NaN


BAD = {
    "black": (lambda f: Image.new("L", (40, 36)).save(f / "0-masklabel.png"), "0-masklabel.png is black: nothing of"),
    "shape": (lambda f: left((40, 20)).save(f / "0-masklabel.png"),
              "0-masklabel.png has 40 x 20 pixels, its picture 40 x 36: expected the same shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_masks_that_cannot_be_are_refused(folder, name):
    prepare, message = BAD[name]
    prepare(folder)
    with pytest.raises(InputError, match=message):
        masked(folder, "label").sample(0)


def test_a_source_without_masks_is_refused(tmp_path):
    plain = pictures(tmp_path / "plain", 1)
    with pytest.raises(InputError, match=r"masks: label finds none in .*: expected 0-masklabel.png of 0.png"):
        masked(plain, "label")
    with pytest.raises(InputError, match="masks.rest must be a number of at least 0, got -1"):
        masked(plain, {"rest": -1})


# --- several folders


@pytest.fixture
def concepts(folder, tmp_path):
    cats = pictures(tmp_path / "5_sks cat", 2, seed=1)
    (cats / "0.txt").write_text("sks cat, left\n")
    return [{"path": str(folder), "captions": "filename", "masks": "auto", "repeats": 2},
            {"path": str(cats), "templates": "a {}", "identifier": "owl", "flip_p": 0}]  # fmt: skip


def test_each_folder_has_settings_of_its_own(concepts):
    data = CaptionedFolder(concepts=concepts, size=32, flip_p=1)
    assert len(data) == 3 * 2 + 2 * 5
    drawn = [data.choose(k) for k in range(len(data))]
    assert Counter(one.caption for one in drawn) == {"0": 2, "1": 2, "2": 2, "sks cat, left": 5, "a owl": 5}
    assert {one.flipped for one in drawn if one.number < 3} == {True}
    assert {one.flipped for one in drawn if one.number >= 3} == {False}
    items = [data.sample(k) for k in range(len(data))]
    assert all(item["loss_mask"].shape == (32, 32) for item in items)
    full = [bool((item["loss_mask"] == 1).all()) for item in items]
    assert full == [one.number >= 3 for one in drawn]
    assert data.all_captions() == ["0", "1", "2", "a owl", "sks cat, left"]
    alone = CaptionedFolder(concepts[1]["path"], size=32, captions="folder")
    assert torch.equal(alone.picture(1, True), data.picture(4, True))


def test_a_folder_of_named_folders_is_kohyas(folder, tmp_path):
    root = tmp_path / "train"
    pictures(root / "3_sks dog", 2), pictures(root / "1_dog", 4, seed=1), (root / "notes").mkdir()
    data = CaptionedFolder(root, size=32)
    assert Counter(data.choose(k).caption for k in range(len(data))) == {"sks dog": 6, "dog": 4}


@pytest.mark.parametrize(
    "concept, message",
    [
        ({"pth": "x"}, "concepts.0: expected path, the path of a folder with pictures, got"),
        ({"path": "x", "captoins": "txt"}, "concepts.0.captoins is unknown; did you mean captions"),
        ({"path": "x", "seed": 3}, "concepts.0.seed: all folders have the same seed; set it beside concepts"),
    ],
)
def test_concepts_that_cannot_be_are_refused(concept, message):
    with pytest.raises(InputError, match=message):
        CaptionedFolder(concepts=[concept], size=32)


@pytest.mark.slow
def test_a_run_of_concepts_with_masks_and_buckets(concepts, tmp_path):
    """`concepts:` in a YAML of one's own; the cache and a resume change nothing, the masks do."""
    lines = ["concepts:"]
    for one in concepts:
        lines += [f"  - {{{', '.join(f'{key}: {value}' for key, value in one.items())}}}"]
    (tmp_path / "concepts.yaml").write_text("\n".join(lines).replace("a {}", "'a {}'"))
    alone = ["--base", TINY, tmp_path / "concepts.yaml", "-t", "-n", "alone", "--logdir", tmp_path, "--max_steps", 1]
    main_dream_booth(*alone, "--accelerator", "cpu", *sets("train", "validation"), "data.params.reg=null", *QUIET)
    assert len(list(tmp_path.glob("2*_alone"))) == 1  # no --data_root

    words = ["--base", tmp_path / "concepts.yaml", *sets("train", "validation"), "data.params.reg=null", *QUIET]
    runs = {
        cache: train(tmp_path, cache, "--max_steps", 6, "--cache", cache, "--data_root", "", *words)
        for cache in ("off", "memory")
    }
    part = train(tmp_path, "part", "--max_steps", 4, "--data_root", "", *words)
    resume(part, "--max_steps", "6")
    for run in (runs["memory"], part):
        assert differences(last(runs["off"])["state_dict"], last(run)["state_dict"]) == []
    whole = train(tmp_path, "whole", "--max_steps", 6, "--data_root", "", *words,
                  "concepts.0.masks=null")  # fmt: skip
    assert differences(last(whole)["state_dict"], last(part)["state_dict"]) != []
