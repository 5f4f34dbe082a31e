"""What determines a trial, as digests: a finished key has its results and is not run again."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints import sha256_of
from ldm.config import PACKAGE, find_file, plain
from ldm.data.pictures import find_pictures
from ldm.interchange.base_choice import NONE, Choice
from ldm.interchange.hub import folder_of
from ldm.models.building import choose_checkpoint
from ldm.train.run_folder import Run

# Where a run finds things and what it keeps in memory: nothing of it changes a number. Files count by their content.
ELSEWHERE = ("data_root", "reg_data_root", "datapath", "reg_datapath", "keep_memory", "cache")
# Code that no number of a training or of a picture depends on.
NO_NUMBERS = ("commands", "study", "interchange", "_data")
VERSIONS = ("torch", "pytorch-lightning", "transformers", "peft", "numpy", "ray")


def digest(value: Any) -> str:
    """24 hexadecimal digits of the SHA-256 of a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:24]


@cache
def _file_digest(path: str, size: int, changed: int) -> str:
    return sha256_of(Path(path))


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file, computed once as long as its size and its time stay."""
    stat = Path(path).stat()
    return _file_digest(str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns)


def pictures_digest(folder: str | Path | None) -> str | None:
    """A digest of the pictures of a folder in their order, whatever their names; None without a folder."""
    return None if folder is None else digest([file_digest(path) for path in find_pictures(folder)])


def base_digest(run: Run) -> str:
    """The SHA-256 of the base's checkpoint with what is chosen of it, or the seed of a random base."""
    path, seed = choose_checkpoint(run.config, run.base)
    if path is None:
        return f"random seed {seed}"
    choice = Choice.of(run.config)
    if choice == NONE:
        return place_digest(path)
    return digest([place_digest(path), choice.ema, *map(place_digest, choice.paths)])


def place_digest(path: str | Path) -> str:
    """A digest of a file, or of a diffusers folder."""
    folder = folder_of(path)
    return file_digest(find_file(path)) if folder is None else tree_digest(folder)


def tree_digest(folder: Path) -> str:
    """A digest of all files below a folder, such as a diffusers model, with their places."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest([[str(path.relative_to(folder)), file_digest(path)] for path in files])


def folder_digest(folder: str | Path) -> str:
    """A digest of the files directly in a folder, such as that of a network, with their names."""
    found = find_file(folder)
    files = sorted(path for path in found.iterdir() if path.is_file()) if found.is_dir() else []
    return digest([str(folder)] if not files else [[path.name, file_digest(path)] for path in files])


@cache
def code_digest() -> str:
    """A digest of this package's source, as far as numbers depend on it, and of torch's version."""
    sources = sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in NO_NUMBERS)
    return digest([torch.__version__, *([str(p.relative_to(PACKAGE)), file_digest(p)] for p in sources)])


def recipe(run: Run, scoring: Mapping[str, Any]) -> dict[str, Any]:
    """All that determines a trial beside the code: config, pictures, base, and how it is scored."""
    config = without_places(copy.deepcopy(plain(run.config)))
    config.pop("checkpoint", None)
    config.get("dreambooth", {}).pop("base", None)
    folders = pictures_of(run)
    return {
        "config": config,
        "seed": run.seed,
        "pictures": {name: pictures_digest(folder) for name, folder in folders.items()},
        "base": base_digest(run),
        "scoring": dict(scoring),
    }


def pictures_of(run: Run) -> dict[str, str | None]:
    """The folders of the subject and of its class."""
    settings = run.config.dreambooth
    has_class = run.config.data.params.get("reg") is not None or bool(settings.get("reg_data_root"))
    return {"subject": settings.data_root, "class": settings.get("reg_data_root") if has_class else None}


def without_places(value: Any) -> Any:
    """A config without what only says where things are."""
    if isinstance(value, dict):
        return {key: without_places(one) for key, one in value.items() if key not in ELSEWHERE}
    return [without_places(one) for one in value] if isinstance(value, list) else value


@cache
def versions() -> dict[str, str]:
    """The versions of Python and of the packages that numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def commit() -> str | None:
    """The git commit of this checkout, with `+` where tracked files differ from it; None outside of a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", "__init__.py") == "":
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
