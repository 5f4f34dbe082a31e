"""The file format of folders with tuned parameters. They are written and read atomically and checked completely.

`adapter_config.json` describes the tensors: position adapters in `adapters.safetensors`, all others in
`tuned.safetensors`. It holds the digests of both, so files of two different saves are never mixed.
Folders of the published code have only `.pt` files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import (
    atomic_write,
    open_folder,
    read_weights,
    refuse_not_finite,
    save_json,
    save_safetensors,
    sha256_of,
)
from ldm.errors import InputError, short
from ldm.files import read_json

TENSORS, TUNED, CONFIG = "adapters.safetensors", "tuned.safetensors", "adapter_config.json"
ATTEMPTS = 20  # to read a folder that is being replaced


@dataclass(frozen=True)
class Folder:
    """The content of a folder at one moment.

    `config` is its JSON; None for folders of the published code. `adapters` are the tensors of position adapters by
    their names in the UNet, `tuned` all other tensors by their names in the model.
    """

    path: Path
    config: dict[str, Any] | None
    adapters: dict[str, Tensor] = field(default_factory=dict)
    tuned: dict[str, Tensor] = field(default_factory=dict)

    @property
    def families(self) -> list[dict[str, Any]]:
        """The entries of the families in `tuned`."""
        return (self.config or {}).get("families", [])


def names_adapter(name: str) -> bool:
    """Whether a name belongs to a position adapter: `...adapter_inout.adp.0.weight`, `...adapter_1.2.bias`."""
    return re.search(r"(^|\.)adapter(_inout)?(_\d+)?\.", name) is not None


def write_folder(
    path: str | Path,
    metadata: Mapping[str, Any],
    adapters: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder from its JSON and its tensors, atomically.

    Raises `InputError` for a tensor that is not finite; then the old folder at `path` stays.
    """
    parts = {name: held for name, held in ((TENSORS, adapters), (TUNED, tuned or {})) if held}
    for held in parts.values():
        refuse_not_finite(held, f"{path} is not written", "what is there already stays")
    with atomic_write(path) as beside:
        beside.mkdir()
        files = {}
        for name, held in parts.items():
            save_safetensors(beside / name, held)
            files[name] = {"tensors": len(held), "sha256": sha256_of(beside / name)}
        save_json(beside / CONFIG, {**metadata, "files": files})


def read_folder(path: str | Path) -> Folder:
    """Read a folder of a training, consistently even while it is being replaced.

    Raises `InputError` if it is not such a folder, is damaged, holds a tensor that its JSON does not name or that is
    not finite, or changes again and again while it is read.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"adapter folder {path} does not exist; expected one that training wrote, such as checkpoints/500-adapters"
        )
    for _ in range(ATTEMPTS):
        with open_folder(path) as (inside, is_current):
            try:
                found = _read(inside, path)
                is_whole = _same_config(inside, found)
            except (InputError, OSError) as error:
                if is_current():
                    raise InputError(str(error).replace(str(inside), str(path))) from None
                continue  # the folder was replaced, and its old files are gone
            if is_whole:
                return found
    raise InputError(f"{path} changes again and again while it is read; try again when nothing writes to it")


def read_config(path: str | Path) -> dict[str, Any] | None:
    """The `adapter_config.json` of a folder; None for a folder of the published code, which has none."""
    file = Path(path) / CONFIG
    if not file.is_file():
        return None
    try:
        config = read_json(file)
        for entry in config["adapters"]:
            entry["kind"], entry["name"], entry["din"], entry["dout"], entry["blocks"], float(entry["scale"])
        for family in config.get("families", []):
            family["family" if "family" in family else "target"], family["params"], list(family["tensors"])
        for entry in config.get("files", {}).values():
            entry["tensors"], entry["sha256"]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({error!r}); expected what save_adapter_to_dir writes") from None
    return config


def _same_config(inside: Path, found: Folder) -> bool:
    return read_config(inside) == found.config


def _read(inside: Path, path: Path) -> Folder:
    config = read_config(inside)
    if config is None:
        return Folder(path, None, _published(inside))
    found = Folder(path, config, *(_tensors(inside / name, config) for name in (TENSORS, TUNED)))
    _check_claims(found)
    for held in (found.adapters, found.tuned):
        _finite(held, path)
    return found


def _tensors(file: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of one file. Raises `InputError` if the digest in the JSON differs."""
    listed, is_there = config.get("files"), file.is_file()
    entry = (listed or {}).get(file.name)
    if entry is None and listed is not None and is_there:
        raise InputError(f"{file.parent} is damaged: {file.name} is not among the files that its {CONFIG} lists")
    if entry is not None and (not is_there or sha256_of(file) != entry["sha256"]):
        raise InputError(f"{file.parent} is damaged: {file.name} is not the file that its {CONFIG} was written with")
    return read_weights(file) if is_there else {}


def _check_claims(folder: Folder) -> None:
    """Raises `InputError` unless each tensor belongs to an adapter or family of the JSON, and none is missing."""
    claimed = {name for family in folder.families for name in family["tensors"]}
    if lacking := sorted(claimed - folder.tuned.keys()):
        raise InputError(f"{folder.path} is damaged: {TUNED} lacks {short(lacking[0])}")
    prefixes = tuple(f"{block}.{entry['name']}." for entry in folder.config["adapters"] for block in entry["blocks"])
    if folder.config["adapters"] and not folder.adapters:
        raise InputError(f"{folder.path} is damaged: it lacks {TENSORS}")
    unclaimed = {
        f"{TENSORS}: {{}} of its tensors belong to no adapter of its {CONFIG}": [
            name for name in folder.adapters if not name.startswith(prefixes)
        ],
        f"{TUNED}: {{}} of its tensors belong to no family of its {CONFIG}": [
            name for name in folder.tuned if name not in claimed
        ],
    }
    for problem, names in unclaimed.items():
        if names:
            raise InputError(f"{folder.path}/{problem.format(len(names))}, e.g. {', '.join(names[:3])}")


def _published(inside: Path) -> dict[str, Tensor]:
    """The tensors of a folder without JSON by their names in the UNet: the `.pt` files of the published code.

    Each transformer adapter is stored twice, as `<name>.pt` and `<name>.adp.pt`, with the same full names.
    """
    if (inside / TUNED).is_file():
        raise InputError(f"{inside} lacks {CONFIG}, which tells what its {TUNED} is")
    if (inside / TENSORS).is_file():  # its names are enough for a model that has the routes
        return _finite(read_weights(inside / TENSORS), inside)
    files = sorted(inside.glob("*.pt"))
    if not files:
        raise InputError(f"adapter folder {inside} holds neither {TENSORS} nor the .pt files of the published code")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= {f"{file.stem}.{key}": value for key, value in read_weights(file).items()}
    return _finite(tensors, inside)


def _finite(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    if wrong := next((name for name, value in tensors.items() if not value.is_floating_point()), None):
        raise InputError(f"{source} is damaged: {wrong} is {tensors[wrong].dtype}, expected floating-point numbers")
    refuse_not_finite(tensors, str(source))
    return tensors
