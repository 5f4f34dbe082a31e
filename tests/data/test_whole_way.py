"""Forty captioned pictures of mixed shapes with masks: buckets, cache, resume, two processes, export, bit for bit."""

import json

import numpy as np
import pytest
from PIL import Image

from ldm.data.folder import CaptionedFolder
from ldm.interchange import lora_keys, own
from tests.runs import arguments, command, differences, find_run, last, resume, tiny_model, train

pytestmark = pytest.mark.slow

SHAPES = [(60, 40), (40, 60), (48, 48), (90, 40), (44, 52)]  # width, height
STEPS = 4
PLAIN = ("model.params.unet_config.params.adapter_config=null", "model.params.train_level=[]")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two folders of twenty pictures: captions and masks in files beside them; in a table and in alpha channels."""
    root = tmp_path_factory.mktemp("whole way")
    draws = np.random.default_rng(0)
    rows = []
    for number in range(40):
        folder = root / ("2_red things" if number < 20 else "others")
        folder.mkdir(exist_ok=True)
        width, height = SHAPES[number % len(SHAPES)]
        coarse = Image.fromarray(draws.integers(0, 256, (6, 6, 3), np.uint8)).resize((width, height))
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2] = 255
        if number < 20:
            (folder / f"{number}.txt").write_text(f"thing, tag {number % 3}, red\na red thing number {number}")
            Image.fromarray(mask).save(folder / f"{number}-masklabel.png")
        else:
            coarse.putalpha(Image.fromarray(mask))
            rows.append(json.dumps({"file_name": f"{number}.png", "text": f"thing, tag {number % 4}"}))
        coarse.save(folder / f"{number}.png")
    (root / "others" / "metadata.jsonl").write_text("\n".join(rows))
    return root


def words(work, *more) -> list[str]:
    """Options of a LoRA on all forty pictures."""
    target = "ldm.data.folder.CaptionedFolder"
    concepts = [{"path": str(work / name)} for name in ("2_red things", "others")]
    params = {
        "concepts": concepts, "buckets": {"step": 8}, "masks": {"source": "auto", "rest": 0.2}, "repeats": None,
        "captions": {"source": "auto", "shuffle_tags": True, "keep_tags": 1, "dropout": 0.1}, "templates": None,
    }  # fmt: skip
    sets = [f"data.params.train.target={target}"]
    sets += [f"data.params.train.params.{name}={json.dumps(value)}" for name, value in params.items()]
    family = [*PLAIN, "model.params.tuning=[{family: lora, params: {rank: 2}}]"]
    quiet = ["lightning.callbacks.image_logger=null", "data.params.reg=null", "data.params.validation=null"]
    return [*sets, *family, *quiet, "--data_root", "", "--max_steps", str(STEPS), *more]


def exported(run, model) -> bytes:
    """The run's LoRA as a file of kohya's."""
    lora_keys.write_kohya(run / "lora.safetensors", own.lora(run / "checkpoints" / f"{STEPS}-adapters"), model)
    return (run / "lora.safetensors").read_bytes()


def test_bit_for_bit(work):
    """One process with a resume, accumulating what two processes do side by side: the same file in the end."""
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}  # nothing may be written beside the pictures
    data = CaptionedFolder(concepts=[{"path": work / "2_red things"}, {"path": work / "others"}], size=32,
                           buckets={"step": 8}, masks="auto")  # fmt: skip
    assert len(data.paths) == 40 and len(data) == 60 and len(set(data.shapes)) >= 4

    kept = str(work.parent / "kept")  # the first run writes it, the others read it
    one = train(work, "one", *words(work, "--cache", kept, "--accumulate_grad_batches", "2", "--max_steps", "2"))
    resume(one, "--max_steps", str(STEPS))
    done = command("main_dream_booth.py", *arguments(
        work, "-n", "two", "--accelerator", "cpu", "--devices", "2", *words(work, "--cache", kept)
    ))  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = find_run(work, "two")
    assert differences(last(one)["state_dict"], last(two)["state_dict"]) == []
    model = tiny_model(*PLAIN)
    files = {exported(run, model) for run in (one, two)}
    assert len(files) == 1 and len(files.pop()) > 1000
    folders = [work / "2_red things", work / "others"]
    assert {path: path.stat().st_mtime_ns for folder in folders for path in (folder, *folder.iterdir())} == before
