"""The weights of one part of a diffusers folder: a file, a variant of it (`.fp16`), or shards with their index."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ldm.checkpoints import read_weights
from ldm.errors import InputError, short
from ldm.files import read_json
from ldm.models.bases import Part

log = logging.getLogger(__name__)

PLAIN = ".non_ema"
VARIANTS = ("", ".fp16", PLAIN)  # the first one that is there is read
WITHOUT_EMA = (PLAIN, "", ".fp16")


def read_part(folder: Path, part: Part, variants: Sequence[str] = VARIANTS) -> dict[str, Tensor]:
    """The weights of a part. Raises `InputError` if it has none, or lacks a shard of its index."""
    for variant in variants:
        if found := _files(folder, part, variant):
            if variant == PLAIN and variants == VARIANTS:
                log.warning("%s has only weights without the average of training (non_ema)", folder)
            return _shards(found[0]) if found[0].suffix == ".json" else read_weights(found[0])
    names = ", ".join(f"{stem}{variant}.{suffix}" for variant in variants for stem, suffix in _kinds(part))
    raise InputError(f"{folder} holds none of {names}, nor an index of shards; is the download complete?")


def choose(folder: Path, part: Part, ema: bool | None) -> Sequence[str]:
    """The variants to look for, in order: with the average of training, without it, or what has the usual name (None).

    Raises `InputError` for a choice that the folder does not have.
    """
    if ema is None:
        return VARIANTS
    plain, others = _files(folder, part, PLAIN), [one for v in ("", ".fp16") for one in _files(folder, part, v)]
    if not plain:
        raise InputError(f"{folder} holds one set of weights (no {part.file}{PLAIN}.*): leave --ema out")
    if ema and not others:
        raise InputError(f"{folder} has only weights without the average of training ({PLAIN[1:]}): no --ema yes")
    log.info("%s: weights %s the average of training (EMA)", folder, "with" if ema else "without")
    return VARIANTS if ema else WITHOUT_EMA


def _kinds(part: Part) -> list[tuple[str, str]]:
    return list(zip((part.file, part.older), ("safetensors", "bin"), strict=True))


def _files(folder: Path, part: Part, variant: str) -> list[Path]:
    """The files of a variant that are there, whole ones and indices of shards, the best first."""
    names = ((f"{stem}{variant}.{suffix}", f"{stem}.{suffix}.index{variant}.json") for stem, suffix in _kinds(part))
    return [folder / name for pair in names for name in pair if (folder / name).is_file()]


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
