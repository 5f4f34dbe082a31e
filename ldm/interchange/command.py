"""Shared by the commands on files: models by path, and outputs that are not overwritten by accident."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoints import read_weights, refuse_not_finite
from ldm.config import find_file, load_config
from ldm.errors import InputError
from ldm.interchange import layers
from ldm.interchange.base_files import folder_of
from ldm.interchange.formats import FORMATS, Context, by_name, open_file
from ldm.interchange.lora import Lora
from ldm.models import building


def to_be_written(path: str | Path, force: bool, kind: str = "") -> Path:
    """The path of an output. Without `--force`, raises `InputError` if it or a file beside it of `kind` exists."""
    path = Path(path)
    for file in [path, *(by_name(kind).codec.beside(path) if kind else [])]:
        if file.exists() and not force:
            raise InputError(f"{file} exists: name another output or add --force")
    return path


def params_of(config: str | Path) -> Any:
    """`model.params` of a config."""
    return load_config(find_file(config)).model.params


def skeleton(config: str | Path) -> nn.Module:
    """The model of a config on the meta device, without values."""
    return layers.skeleton(load_config(find_file(config)))


def read_model(path: str | Path, config: str | Path | None = None) -> dict[str, Tensor]:
    """The weights of a whole model by the names of the model here, from a checkpoint or a diffusers folder.

    A folder may be the name of one in the hub's cache. Its JSON must describe the model of `config` if one is given.

    Raises `InputError` for files that cannot be read and for values that are not finite.
    """
    file = open_file(folder_of(path) or path)
    for row in FORMATS:
        if row.form == "model" and row.codec.recognises(file):
            return row.read("model", file, Context(config=config))
    weights = read_weights(path)  # its content is checked where it is used
    refuse_not_finite(weights, str(path))
    return weights


def filled_model(config: str | Path, weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """The model of a config with the given weights."""
    return building.filled_model(load_config(find_file(config)), weights, source).eval()


def write_lora(path: Path, lora: Lora, model: nn.Module, kind: str, order: str | None = None) -> None:
    """Write a LoRA in one of the formats."""
    by_name(kind).write(path, lora, Context(model, order=order))
