"""What a file is and holds, told without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.interchange.contents import CONTENTS
from ldm.interchange.formats import Context, open_file, recognise


def describe(path: str | Path) -> dict[str, Any]:
    """Kind, size, and what is in it: routes, layers, ranks, words, norms, and what is known of its base model.

    Raises `InputError` for what is of no known kind, damaged or unsafe.
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
