"""Describes a file without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.interchange.contents import CONTENTS
from ldm.interchange.formats import Context, open_file, recognise


def describe(path: str | Path) -> dict[str, Any]:
    """Kind, size and content of a file: routes, layers, ranks, words, norms, and facts about its base model.

    Raises `InputError` for files of unknown kind, damaged files and unsafe files.
    """
    path = Path(path)
    row = recognise(file := open_file(path))
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return {
        "path": str(path),
        "kind": row.name,
        "what": row.title,
        "bytes": sum(f.stat().st_size for f in files),
        **row.codec.notes(file),
        **CONTENTS[row.form].facts(row.read(row.form, file, Context(finite=False))),
    }
