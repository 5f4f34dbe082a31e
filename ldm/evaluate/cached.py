"""Caches results of an evaluation for one choice of settings, so that it continues after an interruption."""

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
    """The result in `file` if it was made with these settings; else the result of `make`, which is stored there.

    Settings and result are JSON. Raises `InputError` if `file` is something else.
    """
    settings = json.loads(json.dumps(settings))  # comparable with settings that were read from a file
    try:
        found = read_json(file) if file.is_file() else {}
    except InputError as error:
        raise InputError(f"{file} cannot be read; remove it: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{file} must be a mapping, as an evaluation stores it; remove it")
    if found.get("settings") != settings:
        found = {**make(), "settings": settings}
        save_json(file, found)
    return found


def class_folder(logdir: Path, word: str, made_with: Mapping[str, Any]) -> Path:
    """The folder for a class's pictures, which differs for different settings."""
    as_json = json.dumps(made_with, sort_keys=True).encode()
    return logdir / "classes" / f"{word}-{hashlib.sha256(as_json).hexdigest()[:8]}"
