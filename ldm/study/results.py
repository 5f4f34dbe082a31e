"""The results of a sweep: one small file per group of trials, written at once, and one table of all of them.

A file `trials/<group>.json` holds the rows of all trials that were trained together. It is there as a whole or not at
all, so that a group is finished or is run again from the beginning, by the same trials.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoints import atomic_write, save_json
from ldm.errors import InputError
from ldm.files import read_json

Row = dict[str, Any]
COLUMNS = (
    "route", "reads", "writes", "family", "seed", "subject", "step", "clip_i", "clip_t", "seconds", "peak_memory",
    "parameters", "status",
)  # fmt: skip
FINISHED = ("done", "stopped")
BYTES = 2**28  # of one group's file


class Results:
    """What is in the folder of a sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[str, list[Row]] = {}  # by key
        for path in sorted((folder / "trials").glob("*.json")):
            found = read_json(path, BYTES)
            if not isinstance(found, list) or not all(
                isinstance(r, dict) and {"key", "status"} <= r.keys() for r in found
            ):
                raise InputError(f"{path} does not hold the rows of trials; remove it, and they are run again")
            self._take(found)

    def _take(self, rows: Iterable[Row]) -> None:
        """Rows in place of what was known of their trials, unless that had come to its end and they have not."""
        by_key: dict[str, list[Row]] = {}
        for row in rows:
            by_key.setdefault(row["key"], []).append(row)
        for key, own in by_key.items():
            known = self.rows.get(key)
            if known is None or (self._order(own) > self._order(known)):
                self.rows[key] = own

    @staticmethod
    def _order(rows: Sequence[Row]) -> tuple:
        return rows[-1]["status"] in FINISHED, rows[-1].get("finished") or ""

    def add(self, group: str, rows: Sequence[Row]) -> None:
        """Write the rows of a group, all or none, and the table."""
        save_json(self.folder / "trials" / f"{group}.json", list(rows))
        self._take(rows)

    def status(self, key: str, recipe: str | None = None) -> str | None:
        """`done`, `stopped`, `failed`, or None for a trial without results; with a `recipe`, those of any code."""
        for own in self.rows.values():
            if own[-1]["key"] == key or recipe is not None and own[-1].get("recipe") == recipe:
                return own[-1]["status"]
        return None

    def table(self) -> Path:
        """Write `results.parquet`: a row for each trial and checkpoint. Raises `InputError` without pandas."""
        path = self.folder / "results.parquet"
        frame = as_frame([row for own in self.rows.values() for row in own])
        with atomic_write(path) as beside:
            frame.to_parquet(beside, index=False)
        return path


def as_frame(rows: Sequence[Row]) -> Any:
    """Rows as a table of pandas: the columns that all have first; what is nested as JSON."""
    try:
        import pandas
        import pyarrow  # noqa: F401 (what pandas writes parquet with)
    except ImportError as error:
        raise InputError(f"results.parquet needs {error.name}: pip install '.[sweep]'") from None
    names = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
    flat = [{name: _flat(row.get(name)) for name in names} for row in rows]
    frame = pandas.DataFrame(flat, columns=list(names))
    order = ["trial", "step"] if "trial" in names else ["step"]
    return frame.sort_values(order, kind="stable", ignore_index=True) if rows else frame


def _flat(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (Mapping, list)) else value
