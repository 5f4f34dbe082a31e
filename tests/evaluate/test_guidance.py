"""`ldm guidance`: a row for each checkpoint and scale, and a figure."""

import csv

import pytest
from PIL import Image

from ldm.commands import Program
from ldm.errors import InputError
from ldm.evaluate.guidance import read_prompts
from tests import runs
from tests.conftest import ROOT

CKPT, CLIP = ROOT / "models/sd-mini/model.safetensors", str(ROOT / "models/sd-mini/clip")
SUBJECTS = ("dog", "cat", "monkey", "woman", "apple")


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = runs.pictures(tmp_path_factory.mktemp("captioned"), 5)
    for number, name in enumerate(SUBJECTS):
        (folder / f"{number}.txt").write_text(f"an emoji of a {name}\n")
    return folder


@pytest.mark.slow
def test_every_scale_of_every_checkpoint(captioned, tmp_path, capsys):
    (tmp_path / "other.safetensors").symlink_to(CKPT)
    words = [CKPT, tmp_path / "other.safetensors", "--captions", captioned, "--scales", "0", "5", "--ddim_steps", "4"]
    words += ["--network", CLIP, "--device", "cpu", "--cache", "off", "--out", tmp_path / "out"]
    words += ["--pictures", tmp_path / "kept"]
    Program("guidance")([str(word) for word in words])
    rows = list(csv.DictReader((tmp_path / "out" / "guidance.csv").open()))
    assert [row["scale"] for row in rows] == ["0.0", "5.0"] * 2
    assert [row.pop("checkpoint") for row in rows] == ["model", "model", "other", "other"]
    assert {"clip_t", "clip_t_low", "clip_t_high", "clip_fid", "clip_kid", "clip_kid_std"} <= rows[0].keys()
    assert float(rows[1]["clip_t"]) > float(rows[0]["clip_t"])  # scale 0 is without the caption
    assert rows[0] == rows[2] and rows[1] == rows[3]  # same prompts and seeds
    assert len(list((tmp_path / "kept" / "model" / "5").glob("*.png"))) == 5
    assert Image.open(tmp_path / "out" / "guidance.png").size == (1350, 600)
    assert "scale 5, clip_t" in capsys.readouterr().out


def test_prompts_are_chosen_at_random(captioned, tmp_path):
    assert read_prompts(captioned) == [f"an emoji of a {name}" for name in SUBJECTS]
    (tmp_path / "list.txt").write_text("\n".join(map(str, range(9))))
    chosen = read_prompts(tmp_path / "list.txt", 4, seed=1)
    assert chosen == read_prompts(tmp_path / "list.txt", 4, seed=1) != read_prompts(tmp_path / "list.txt", 4, seed=2)
    (tmp_path / "list.txt").write_text("one\n")
    for given, message in ((tmp_path / "list.txt", "has 1 captions; expected at least 4"),
                           (tmp_path / "absent", "expected a text file with a caption per line")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read_prompts(given)
    (tmp_path / "list.txt").write_text("a\nb\nc\nd\n")
    with pytest.raises(InputError, match="--against is missing"):
        Program("guidance")([str(CKPT), "--captions", str(tmp_path / "list.txt")])
