"""Shared by the commands on files: models by path, and outputs that are not overwritten by accident."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoints import read_weights, refuse_not_finite
from ldm.config import named_config
from ldm.errors import InputError
from ldm.interchange import layers, own
from ldm.interchange.base_choice import Choice
from ldm.interchange.formats import FORMATS, Context, Format, Opened, by_name, open_file
from ldm.interchange.hub import folder_of
from ldm.interchange.lora import Lora
from ldm.models import building
from ldm.models.bases import DEFAULT, base_of


def to_be_written(path: str | Path, force: bool, kind: str = "") -> Path:
    """The path of an output. Without `--force`, raises `InputError` if it or a file beside it of `kind` exists."""
    path = Path(path)
    for file in [path, *(by_name(kind).codec.beside(path) if kind else [])]:
        if file.exists() and not force:
            raise InputError(f"{file} exists: name another output or add --force")
    return path


def config_for(given: str | None, *paths: str | Path | Opened) -> str:
    """The config of the model that files belong to: the given one, that of the run of a file, that of its base.

    Only a whole model tells its base; without all of these it is Stable Diffusion v1.
    """
    if given:
        return given
    for path in paths:
        if run := own.run_of(path.given if isinstance(path, Opened) else Path(path)):
            return str(run / own.CONFIG)
    for path in paths:
        file, row = _whole_model(path)
        if row and (base := base_of(row.read("model", file, Context(finite=False)))):
            return base.config
    return DEFAULT.config


def _whole_model(path: str | Path | Opened) -> tuple[Opened, Format | None]:
    """A file or folder, or the name of one on the hub, and its format if that is one of whole models."""
    file = path if isinstance(path, Opened) else open_file(folder_of(path) or path)
    return file, next((row for row in FORMATS if row.form == "model" and row.codec.recognises(file)), None)


def params_of(config: str | Path) -> Any:
    """`model.params` of a config."""
    return named_config(config).model.params


def skeleton(config: str | Path) -> nn.Module:
    """The model of a config on the meta device, without values."""
    return layers.skeleton(named_config(config))


def read_model(
    path: str | Path, config: str | Path | None = None, choice: Choice | None = None
) -> Mapping[str, Tensor]:
    """The weights of a whole model by the names of the model here, from a checkpoint or a diffusers folder.

    A folder may be the name of one in the hub's cache. Its JSON must describe the model of `config` if one is given.
    `choice`: other parts, which need a config, and which of two sets of weights.

    Raises `InputError` for files that cannot be read and for values that are not finite.
    """
    file, row = _whole_model(path)
    if row:
        return row.read("model", file, Context(config=config, choice=choice))
    weights = read_weights(path)  # its content is checked where it is used
    refuse_not_finite(weights, str(path))
    return weights


def filled_model(config: str | Path, weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """The model of a config with the given weights."""
    return building.filled_model(building.untuned(named_config(config)), weights, source).eval()


def told_words(kind: str, lora: Lora) -> str:
    """The end of a line about an output: the words in it, or those that its format cannot hold."""
    words = ", ".join(lora.tokens)
    if not words:
        return ""
    return f", words {words}" if "words" in by_name(kind).holds else (
        f"; the words {words} are not in it: convert each file --to words")  # fmt: skip


def write_lora(path: Path, lora: Lora, model: nn.Module, kind: str, order: str | None = None) -> None:
    """Write a LoRA in one of the formats."""
    by_name(kind).write(path, lora, Context(model, order=order))
