"""Writes scores: JSON with everything, CSV with a row per checkpoint, NPY in the format of the published code."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.checkpoints import atomic_write, save_json
from ldm.errors import InputError
from ldm.evaluate.metrics import column
from ldm.evaluate.scoring import Scores


def save(path: str | Path, scores: Sequence[Scores]) -> None:
    """Write the scores of checkpoints, in order, in the format of the file's suffix. Raises `InputError`."""
    WRITERS[check(path)](Path(path), scores)


def check(path: str | Path) -> str:
    """The suffix of a file to write. Raises `InputError` for unknown suffixes."""
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise InputError(f"--out {path}: expected a name that ends in {', '.join(WRITERS)}")
    return suffix


def _json(path: Path, scores: Sequence[Scores]) -> None:
    save_json(path, [one.as_json() for one in scores])


def rows(scores: Sequence[Scores]) -> list[dict[str, Any]]:
    """A flat row for each checkpoint, with the same columns in all rows."""
    found = []
    for one in scores:
        head = {"source": one.source, "step": one.step, "class_word": one.class_word}
        networks = {f"{label}_network": network["name"] for label, network in one.networks.items()}
        found.append(head | one.row() | networks | {"seconds": one.seconds, "protocol": json.dumps(one.protocol)})
    columns = list(dict.fromkeys(name for row in found for name in row))
    return [{name: row.get(name) for name in columns} for row in found]


def _csv(path: Path, scores: Sequence[Scores]) -> None:
    table = rows(scores)
    with atomic_write(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def _npy(path: Path, scores: Sequence[Scores]) -> None:
    """The published code's `similar.npy`: float32 [checkpoints], the mean CLIP-I of each to the photographs."""
    name = column("clip", "i")
    if lacking := [one.source for one in scores if name not in one.values]:
        raise InputError(f"{path}: {lacking[0]} has no {name}; it takes photographs and a CLIP as network")
    with atomic_write(path) as beside, beside.open("wb") as file:
        np.save(file, np.array([one.values[name].mean for one in scores], dtype=np.float32), allow_pickle=False)


WRITERS = {".json": _json, ".csv": _csv, ".npy": _npy}
