"""What an evaluation keeps, so that it goes on where it was interrupted: for one choice of settings and no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoints import save_json
from ldm.errors import explain
from ldm.files import read_text


def kept(file: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `file` keeps if it was made with these settings; else what `make` gives now, which is kept there.

    Both the settings and the result are JSON; raises `InputError` where `file` is something else.
    """
    settings = json.loads(json.dumps(settings))  # as they are read again
    with explain(f"{file} cannot be read; remove it", ValueError):
        found = json.loads(read_text(file)) if file.is_file() else {}
    if found.get("settings") != settings:
        found = {**make(), "settings": settings}
        save_json(file, found)
    return found


def class_folder(logdir: Path, word: str, made_with: Mapping[str, Any]) -> Path:
    """The folder for a class's pictures, another one for whatever else they are made with."""
    told = json.dumps(made_with, sort_keys=True).encode()
    return logdir / "classes" / f"{word}-{hashlib.sha256(told).hexdigest()[:8]}"
