"""Aspect-ratio buckets: the shapes, batches of one shape each, crops, and that caches, resumes and ranks agree."""

import itertools
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.buckets import Buckets, GroupedOrder, told
from ldm.data.folder import CaptionedFolder
from ldm.data.pictures import fit_square, read_picture, region
from ldm.data.sampling import ResumableBatches
from ldm.errors import InputError
from tests.runs import TINY, differences, last, pictures, resume, train

SIZES = [(60, 40), (40, 60), (50, 50), (61, 40), (90, 30), (45, 44)]  # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six pictures of noise in four shapes."""
    root = tmp_path_factory.mktemp("shapes")
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(root / f"{number}.png")
    return root


def bucketed(folder, **more) -> CaptionedFolder:
    return CaptionedFolder(folder, **{"size": 32, "buckets": True, "captions": "filename", **more})


def test_the_shapes_at_full_size():
    buckets = Buckets(512, True)
    assert all(h % 64 == w % 64 == 0 and 256 <= min(h, w) and max(h, w) <= 1024 for h, w in buckets.shapes)
    assert all(h * w <= 512**2 and (w, h) in buckets.shapes for h, w in buckets.shapes)
    assert buckets.shape_of(3000, 4000, "") == (448, 576)
    assert buckets.shape_of(4000, 3000, "") == (576, 448)
    assert buckets.shape_of(700, 700, "") == (512, 512)
    assert buckets.shape_of(100, 4000, "") == (256, 1024)  # the longest there is
    assert Buckets(512, {"step": 32, "min": 384, "max": 640}).shape_of(100, 4000, "") == (384, 640)


def test_small_pictures_are_not_enlarged_if_so_asked():
    buckets = Buckets(512, {"upscale": False})
    assert buckets.shape_of(200, 330, "") == (192, 320)
    assert buckets.shape_of(3000, 4000, "") == (448, 576)
    assert Buckets(512, True).shape_of(200, 330, "") == (384, 640)
    with pytest.raises(InputError, match="a.png has 300 x 60 pixels, less than one step of 64: remove it, or set"):
        buckets.shape_of(60, 300, "a.png")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"step": 48}, "expected step <= min <= size <= max and a size that is a multiple of step, got step 48"),
        ({"min": 600}, "min 600, size 512"),
        ({"stp": 8}, "buckets.stp is unknown; did you mean step"),
        ({"max": 0}, "buckets.max must be a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Buckets(512, settings)


def test_every_group_has_one_shape_and_every_picture_is_shown():
    shapes = [(1, 1)] * 5 + [(1, 2)] * 2 + [(2, 1)]
    grouped = GroupedOrder(shapes, [3, 1, 1, 1, 1, 1, 1, 1], group=4)
    assert grouped.length == 8 + 4 + 4
    orders = [grouped.order(torch.Generator().manual_seed(seed)) for seed in range(30)]
    for order in orders:
        for group in order.view(-1, 4).tolist():
            assert len({shapes[number] for number in group}) == 1
        assert set(order.tolist()) == set(range(8)) and order.tolist().count(0) >= 3
    assert len({tuple(order.tolist()) for order in orders}) > 20
    extra = {n for order in orders for n in range(1, 5) if order.tolist().count(n) > 1}
    assert extra == {1, 2, 3, 4}  # other pictures fill up in other epochs
    assert grouped.order(None).tolist() == [0, 0, 0, 1, 2, 3, 4, 0, 5, 6, 5, 6, 7, 7, 7, 7]
    assert GroupedOrder(shapes[:5], [1] * 5).length == 5


def test_items_have_the_shape_of_their_bucket(folder, caplog):
    from ldm.data import shaped as module

    module._tell.cache_clear()
    with caplog.at_level(logging.INFO):
        data = bucketed(folder, set="val", sizes=True)
    assert "buckets 40 x 24: 2, 32 x 32: 2, 48 x 16: 1, 24 x 40: 1" in caplog.text
    shapes = {data.sample(k)["caption"]: tuple(data.sample(k)["image"].shape) for k in range(len(data))}
    assert shapes == {"0": (24, 40, 3), "1": (40, 24, 3), "2": (32, 32, 3), "3": (24, 40, 3), "4": (16, 48, 3),
                      "5": (32, 32, 3)}  # fmt: skip
    assert told([(1, 2), (2, 1), (1, 2)]) == "2 x 1: 2, 1 x 2: 1"
    one = next(data.sample(k) for k in range(6) if data.choose(k).number == 0)
    assert one["original_size_as_tuple"].tolist() == [40, 60] and one["target_size_as_tuple"].tolist() == [24, 40]
    assert one["crop_coords_top_left"].tolist() == [2 * 24 // 36, 0]  # 60 x 36 of 60 x 40 is shown


def test_a_square_is_what_it_was_without_buckets(folder):
    for path in sorted(folder.iterdir()):
        picture = read_picture(path)
        side = min(picture.size)
        left, top = (picture.size[0] - side) // 2, (picture.size[1] - side) // 2
        assert region(*picture.size[::-1], (32, 32)) == (top, left, side, side)
    plain = CaptionedFolder(folder, size=32, captions="filename", set="val")
    assert torch.equal(plain.parts[0]._read(0), fit_square(read_picture(folder / "0.png"), 32))


def test_crops(folder):
    whole = bucketed(folder, crop="none", set="val")
    assert torch.equal(whole.parts[0]._read(0), torch.from_numpy(
        np.array(read_picture(folder / "0.png").resize((40, 24), Image.Resampling.BICUBIC))
    ).permute(2, 0, 1))  # fmt: skip
    random = bucketed(folder, crop="random", repeats=40, sizes=True, flip_p=0)
    corners = {tuple(random.sample(k)["crop_coords_top_left"].tolist()) for k in range(240)}
    assert len(corners) > 4
    again = bucketed(folder, crop="random", repeats=40, sizes=True, flip_p=0)
    assert all(torch.equal(random.sample(k)["image"], again.sample(k)["image"]) for k in reversed(range(20)))
    assert random.why_not_cached and bucketed(folder).why_not_cached is None
    with pytest.raises(InputError, match="crop: expected one of center, random, none, got 'centre'"):
        bucketed(folder, crop="centre")


def test_two_processes_share_batches_of_one_shape_and_resume_anywhere(folder):
    """Both ranks of each batch, and what follows after a restart within the second epoch."""

    def seen(start: int, count: int) -> list[list[int]]:
        data = bucketed(folder, repeats=3)
        data.group_by(2 * 2)
        ranks = []
        for rank in range(2):
            length = len(data) // 4
            batches = ResumableBatches(2, start, length, rank=rank, world_size=2)
            drawn = itertools.islice(itertools.chain.from_iterable(itertools.repeat(batches)), count)
            ranks.append([[data.choose(k).number for k in batch] for batch in drawn])
        return [sum(both, []) for both in zip(*ranks, strict=True)]

    data = bucketed(folder)
    whole = seen(0, 14)
    assert all(len({data.shape_of(number) for number in batch}) == 1 for batch in whole)
    assert seen(9, 5) == whole[9:]
    epoch = whole[: len(whole) // 2]
    assert {number for batch in epoch for number in batch} == set(range(6))


def test_trainings_side_by_side_refuse_buckets(folder, tmp_path):
    from scripts.train_many import main

    words = ["--base", TINY, TINY, "-t", "--data_root", folder, "--logdir", tmp_path, "data.params.reg=null"]
    with pytest.raises(InputError, match="side by side compute together what has one shape; train buckets alone"):
        main([str(word) for word in [*words, *sets("train"), "--accelerator", "cpu"]])


TARGET = "ldm.data.folder.CaptionedFolder"
QUIET = ("lightning.callbacks.image_logger.params.disabled=true", "lightning.callbacks.compiled=null")


def sets(*names: str, **params) -> list[str]:
    """Overrides that make datasets of a run captioned folders with buckets."""
    given = {"buckets": {"step": 8}, **params}
    return [word for name in names for word in (
        f"data.params.{name}.target={TARGET}", *(f"data.params.{name}.params.{k}={v}" for k, v in given.items())
    )]  # fmt: skip


@pytest.mark.slow
def test_a_run_with_buckets_is_the_same_with_caches_and_after_a_resume(folder, tmp_path):
    """Batches of two, class pictures in buckets of their own; a cache in memory and in a folder."""
    pictures(tmp_path / "photos", 1), pictures(tmp_path / "class", 3, seed=1)
    words = ["--data_root", folder, "data.params.batch_size=2", *sets("train", "reg", "validation"), *QUIET]
    kept = str(tmp_path / "kept")
    runs = {
        name: train(tmp_path, name, "--max_steps", 7, "--cache", where, *words)
        for name, where in {"memory": "memory", "written": kept, "read": kept}.items()
    }
    part = train(tmp_path, "part", "--max_steps", 4, "--cache", kept, *words)
    resume(part, "--max_steps", "7")
    for run in (runs["written"], runs["read"], part):
        assert differences(last(runs["memory"])["state_dict"], last(run)["state_dict"]) == []
    assert len(list((tmp_path / "kept").iterdir())) == 2


@pytest.mark.slow
def test_accumulated_batches_of_one_shape_are_those_without_a_cache(folder, tmp_path):
    words = ["--data_root", folder, "--accumulate_grad_batches", 2, *sets("train"), "data.params.reg=null", *QUIET]
    off, memory = (train(tmp_path, where, "--max_steps", 3, "--cache", where, *words) for where in ("off", "memory"))
    assert differences(last(off)["state_dict"], last(memory)["state_dict"]) == []


@pytest.mark.slow
def test_a_random_crop_is_not_cached_and_resumes(folder, tmp_path, caplog):
    words = ["--data_root", folder, *sets("train", crop="random"), "data.params.reg=null", *QUIET]
    with caplog.at_level(logging.INFO):
        whole = train(tmp_path, "whole", "--max_steps", 5, *words)
    assert "pictures are encoded in every step, captions only once: crop: random, at each draw anew" in caplog.text
    part = train(tmp_path, "part", "--max_steps", 4, *words)
    resume(part, "--max_steps", "5")
    assert differences(last(whole)["state_dict"], last(part)["state_dict"]) == []
