"""Base models by path: a checkpoint, a diffusers folder, or the name of one on the hub, which the hub's cache holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import read_weights
from ldm.errors import InputError
from ldm.interchange import diffusers_json, diffusers_model
from ldm.interchange.base_choice import Choice
from ldm.interchange.hub import folder_of
from ldm.models.bases import Base, base_of, recognise


def base_weights(path: str | Path, config: Any = None) -> Mapping[str, Tensor]:
    """The weights of a base by the names of the model here.

    path: a checkpoint, a diffusers folder, or `owner/name` of one in the hub's cache; nothing is downloaded
    config: the config of the model that the weights are for, with which the JSON of a folder is compared. Its section
        `checkpoint` may name parts that take the place of the base's own, see `base_choice`

    Raises `InputError`.
    """
    found, choice = folder_of(path), Choice.of(config)
    if found is None:
        return choice.completed(choice.averaged(read_weights(path), str(path)), str(path), config)[0]
    params = None if config is None else config["model"]["params"]
    weights, others = choice.completed(diffusers_model.read_folder(found, params, choice.ema), str(path), config)
    if params is not None:
        diffusers_json.check(found, params, path, others)
    return weights


def known_base(path: str | Path) -> Base:
    """The base that a checkpoint or folder is of. Raises `InputError` for another file, named if it is known."""
    weights = base_weights(path)
    if (base := base_of(weights)) is not None:
        return base
    what = recognise(weights)
    raise InputError(
        f"{path} is {what.what}: {what.instead}" if what else f"{path} is of no base that is known: name its config"
    )


def reader(config: Any) -> Callable[[str | Path], Mapping[str, Tensor]]:
    """`base_weights` for the model of a config."""
    return partial(base_weights, config=config)
