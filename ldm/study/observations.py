"""The rows of a sweep that an analysis uses: one for each finished trial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ldm.errors import InputError, did_you_mean

FINISHED = ("done", "stopped")


def read_results(path: str | Path) -> pd.DataFrame:
    """A table of results, `.parquet` or `.csv`. Raises `InputError` for what is neither."""
    path = Path(path)
    if path.is_dir():
        path = path / "results.parquet"
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected results.parquet of a sweep, or a .csv")
    try:
        frame = pd.read_csv(path) if path.suffix.lower() == ".csv" else pd.read_parquet(path)
    except (ValueError, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a table of results: {' '.join(str(error).split())[:200]}") from None
    if frame.empty:
        raise InputError(f"{path} has no rows: no trial has ended")
    return frame


def last_of_each_trial(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The last row of each trial that ended well, and what was left out, as sentences."""
    notes = []
    if "status" in frame.columns:
        ended = frame["status"].isin(FINISHED)
        if failed := int((~ended).sum()):
            notes.append(f"{failed} rows of trials that failed or have not ended were left out")
        frame = frame[ended]
    if "key" in frame.columns and "step" in frame.columns:
        last = frame.sort_values("step", kind="stable").groupby("key", sort=False).tail(1)
        if earlier := len(frame) - len(last):
            notes.append(f"{earlier} rows of earlier checkpoints were left out: the last of each trial counts")
        frame = last
    return frame, notes


def where(frame: pd.DataFrame, wanted: Mapping[str, str]) -> pd.DataFrame:
    """The rows whose columns have these values, written as text. Raises `InputError` for a column that is absent."""
    for column, value in wanted.items():
        if column not in frame.columns:
            raise InputError(f"--where {column}={value}: no such column{did_you_mean(column, map(str, frame.columns))}")
        frame = frame[frame[column].astype(str).isin(value.split(","))]
    if frame.empty:
        raise InputError(f"no row has {', '.join(f'{column}={value}' for column, value in wanted.items())}")
    return frame
