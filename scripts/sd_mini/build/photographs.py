"""CIFAR-10 out of PNG sheets: one picture per row, 32 x 32 x 3 numbers, row by row."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

# Label number -> the names under which its pictures are captioned.
NAMES = (
    ("airplane", "plane"), ("car", "automobile"), ("bird",), ("cat",), ("deer",),
    ("dog",), ("frog",), ("horse",), ("ship", "boat"), ("truck",),
)  # fmt: skip


def read_sheets(folder: Path, part: str, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `per_class` photographs of each class: uint8 [n, 32, 32, 3] and their labels [n], in file order.

    part: "train" (five sheets of 10,000) or "test" (one).
    """
    sheets = sorted(folder.glob("data_batch_*.png")) if part == "train" else [folder / "test_batch.png"]
    labels = np.array(json.loads((folder / f"{part}_lables.json").read_text()))  # spelt so in the package
    taken = np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(len(NAMES))])
    taken.sort()
    pictures, start = [], 0
    for sheet in sheets:
        rows = np.asarray(Image.open(sheet).convert("RGB")).reshape(-1, 32, 32, 3)
        pictures.append(rows[taken[(taken >= start) & (taken < start + len(rows))] - start])
        start += len(rows)
    return np.concatenate(pictures), labels[taken]
