"""What an evaluation keeps, so that it goes on where it was interrupted: for one choice of settings and no other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldm.checkpoints import save_json
from ldm.errors import InputError
from ldm.files import read_json


def cached(file: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `file` keeps if it was made with these settings; else what `make` gives now, which is kept there.

    Both the settings and the result are JSON; raises `InputError` where `file` is something else.
    """
    settings = json.loads(json.dumps(settings))  # as they are read again
    try:
        found = read_json(file) if file.is_file() else {}
    except InputError as error:
        raise InputError(f"{file} cannot be read; remove it: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} is no mapping, as an evaluation keeps it; remove it")
    if found.get("settings") != settings:
        found = {**make(), "settings": settings}
        save_json(file, found)
    return found


def class_folder(logdir: Path, word: str, made_with: Mapping[str, Any]) -> Path:
    """The folder for a class's pictures, another one for whatever else they are made with."""
    as_json = json.dumps(made_with, sort_keys=True).encode()
    return logdir / "classes" / f"{word}-{hashlib.sha256(as_json).hexdigest()[:8]}"
