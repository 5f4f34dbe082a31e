"""Checkpoints of whole models, as LDM writes them: `.safetensors`, or a torch file with `state_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ldm.checkpoints import save_safetensors, save_torch, weights_in
from ldm.interchange.formats import Codec, Context, Opened
from ldm.models import bases


def is_checkpoint(file: Opened) -> bool:
    """Whether a file holds the weights of a whole model."""
    state = file.content.get("state_dict", file.content) if isinstance(file.content, Mapping) else None
    return isinstance(state, Mapping) and bases.holds_unet(state)


def read(file: Opened) -> dict[str, Tensor]:
    """The weights by the names of the model here."""
    return dict(bases.in_model_names(weights_in(file.content, file.path)))


def write(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights by the names of released files: `.safetensors` by that suffix, else a torch file."""
    weights = bases.in_released_names(weights)
    if path.suffix == ".safetensors":
        save_safetensors(path, {name: value.clone() for name, value in weights.items()})
    else:
        save_torch(path, {"state_dict": dict(weights)})


def _write(path: Path, weights: Mapping[str, Tensor], context: Context) -> None:
    write(path, weights)


def _read(file: Opened, context: Context) -> Mapping[str, Tensor]:
    weights = read(file)
    if context.choice is not None:
        weights = context.choice.averaged(weights, str(file.given))
    return context.checked(context.completed(weights, file.given)[0], file.given)


CHECKPOINT = Codec(is_checkpoint, {"model": _read}, _write)
