"""The weights of one part of a diffusers folder: a file, a variant of it (`.fp16`), or shards with their index."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.checkpoints import read_weights
from ldm.errors import InputError, short
from ldm.files import read_json
from ldm.models.bases import Part

log = logging.getLogger(__name__)

VARIANTS = ("", ".fp16", ".non_ema")  # the first one that is there is read


def read_part(folder: Path, part: Part) -> dict[str, Tensor]:
    """The weights of a part. Raises `InputError` if it has none, or lacks a shard of its index."""
    kinds = list(zip((part.file, part.older), ("safetensors", "bin"), strict=True))
    for variant in VARIANTS:
        for stem, suffix in kinds:
            file = folder / f"{stem}{variant}.{suffix}"
            index = folder / f"{stem}.{suffix}.index{variant}.json"
            found = [one for one in (file, index) if one.is_file()]
            if found and variant == ".non_ema":
                log.warning("%s has only weights without the average of training (non_ema)", folder)
            if found:
                return read_weights(file) if found[0] == file else _shards(index)
    names = ", ".join(f"{stem}{variant}.{suffix}" for variant in VARIANTS for stem, suffix in kinds)
    raise InputError(f"{folder} holds none of {names}, nor an index of shards; is the download complete?")


def _shards(index: Path) -> dict[str, Tensor]:
    """The weights of all files that an index names. They lie beside it."""
    json = read_json(index)
    places = json.get("weight_map") if isinstance(json, Mapping) else None
    if not isinstance(places, Mapping) or not places:
        raise InputError(f"{index}: expected weight_map, names of weights and of the files that hold them")
    weights: dict[str, Tensor] = {}
    for name in dict.fromkeys(places.values()):
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: expected names of files beside it, got {short(name)}")
        if not (index.parent / name).is_file():
            raise InputError(f"{index.parent} lacks {name}, which {index.name} names; is the download complete?")
        weights |= read_weights(index.parent / name)
    if lost := [name for name in places if name not in weights]:
        raise InputError(f"{index.parent} lacks {len(lost)} weights that {index.name} names, e.g. {short(lost[0])}")
    return weights
