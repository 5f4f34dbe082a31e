"""The folder of a sweep as `ldm sweep` leaves it, made in no time: known numbers, pictures of one colour each."""

import json
from pathlib import Path

import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.study.keys import pictures_digest

ROUTES = ("attn1i-attn2i", "attn1i-ffni", "attn2o-ffni", "attn2o-transo")
# What a route adds to CLIP-I, and to prior drift: the second one is beaten in both by the third and the fourth.
FIDELITY = dict(zip(ROUTES, (0.00, 0.02, 0.20, 0.10), strict=True))
DRIFT = dict(zip(ROUTES, (0.05, 0.12, 0.11, 0.02), strict=True))
PROMPTS = ("a sks dog", "a sks dog in the snow")


def picture(path: Path, colour: tuple[int, int, int], note: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_text("prompt", note)
    Image.new("RGB", (16, 16), colour).save(path, pnginfo=text)


def rows(folder: Path, subjects=("a", "b"), routes=ROUTES, prompts=PROMPTS, steps=(50, 100)) -> list[dict]:
    """Rows of all trials; their pictures are written."""
    found = []
    digests = {}
    for subject in subjects:
        for number in range(3):
            picture(folder / "photos" / subject / f"{number}.png", (10, 10 * number, 99))
        digests[subject] = pictures_digest(folder / "photos" / subject)
    for number, prompt in enumerate(prompts):
        picture(folder / "pictures" / "base" / "basis" / f"{number:02}.png", (1, 2, number), prompt)
    for trial, (route, subject, seed) in enumerate((r, s, n) for r in routes for s in subjects for n in (1, 2)):
        reads, _, writes = route.partition("-")
        for step in steps:
            score = (
                0.5 + FIDELITY.get(route, 0) * step / 100 + 0.05 * (subject == "b") + 0.001 * seed + 0.002 * (trial % 3)
            )
            drift = DRIFT.get(route, 0) + 0.001 * seed
            key = f"key{trial:02}"
            for number, prompt in enumerate(prompts):
                picture(
                    folder / "pictures" / key / f"{step:06}" / f"{number:02}.png", (9 * trial, number, step), prompt
                )
            found.append({
                "route": route, "reads": reads, "writes": writes, "family": "position", "seed": seed,
                "subject": subject, "step": step, "clip_i": score,
                "clip_t": 0.3, "seconds": 2.0 * step / 100, "seconds_scoring": 0.5, "peak_memory": 2**30,
                "parameters": 1000, "status": "done", "trial": trial, "class_word": "dog", "reason": None, "key": key,
                "clip_i_low": score - 0.02, "clip_i_high": score + 0.02, "clip_prior_shift": drift,
                "clip_prior_shift_low": drift - 0.01, "clip_prior_shift_high": drift + 0.01, "mid_dim": len(route),
                "efficientnet_i": 0.9 * score, "efficientnet_i_low": 0.1, "efficientnet_i_high": 0.9,
                "subject_pictures": digests[subject], "base_pictures": "basis", "commit": "0123abc",
                "versions": json.dumps({"python": "3.11.2", "torch": "2.5"}),
                "each": json.dumps([{"prompt": p, "seed": n, "clip_i": score} for n, p in enumerate(prompts)]),
                "config": json.dumps({"model": {"rate": 0.1, "route": route}, "seed": 7,
                                      "dreambooth": {"data_root": str(folder / "photos" / subject)}}),
            })  # fmt: skip
    return found


FAILED = {"route": "attn1i-ffni", "reads": "attn1i", "writes": "ffni", "family": "position", "seed": 3, "subject": "a",
          "status": "failed", "key": "keyfail", "trial": 99, "reason": "the loss is not finite"}  # fmt: skip


def write(folder: Path, table: list[dict], commands: str = "ldm sweep --base a.yaml route=all") -> Path:
    """`results.parquet` and `commands.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(table).to_parquet(folder / "results.parquet", index=False)
    (folder / "commands.txt").write_text(commands + "\n")
    return folder / "results.parquet"
