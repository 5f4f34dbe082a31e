"""What the commands on files share: models by path, and outputs that are not overwritten by accident."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.checkpoints import read_weights, refuse_not_finite, save_safetensors, save_torch
from ldm.config import find_file, load_config
from ldm.errors import InputError
from ldm.interchange import cloneofsimo, diffusers_model, layers, lora_keys
from ldm.interchange.lora import Lora
from ldm.models import building


def to_be_written(path: str | Path, force: bool, kind: str = "") -> Path:
    """The path of an output. Raises `InputError` if it exists, with what `kind` has beside it, without `--force`."""
    path = Path(path)
    for file in [path, cloneofsimo.text_beside(path)] if kind == "cloneofsimo-pt" else [path]:
        if file.exists() and not force:
            raise InputError(f"{file} exists: name another output or add --force")
    return path


def params_of(config: str | Path) -> Any:
    """`model.params` of a config."""
    return load_config(find_file(config)).model.params


def skeleton(config: str | Path) -> nn.Module:
    """The model of a config without its numbers."""
    return layers.skeleton(load_config(find_file(config)))


def read_model(path: str | Path) -> dict[str, Tensor]:
    """The weights of a whole model by LDM's names, from a checkpoint or a diffusers folder.

    Raises `InputError` for what cannot be read and for values that are not finite, which nothing is made of.
    """
    weights = diffusers_model.read_folder(path) if diffusers_model.is_folder(path) else read_weights(path)
    refuse_not_finite(weights, str(path))
    return weights


def filled_model(config: str | Path, weights: Mapping[str, Tensor], source: str) -> nn.Module:
    """The model of a config with the given weights."""
    return building.filled_model(load_config(find_file(config)), weights, source).eval()


def write_checkpoint(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint: `.safetensors` by that suffix, else a torch file with `state_dict`."""
    if path.suffix == ".safetensors":
        save_safetensors(path, {name: value.clone() for name, value in weights.items()})
    else:
        save_torch(path, {"state_dict": dict(weights)})


def write_lora(path: Path, lora: Lora, model: nn.Module, kind: str, order: str = "diffusers") -> None:
    """Write a LoRA in one of the formats."""
    if kind in ("diffusers", "kohya"):
        {"diffusers": lora_keys.write_diffusers, "kohya": lora_keys.write_kohya}[kind](path, lora, model)
    else:
        content = cloneofsimo.from_lora(lora, model, order)
        {"cloneofsimo": cloneofsimo.write_safetensors, "cloneofsimo-pt": cloneofsimo.write_pt}[kind](path, content)
