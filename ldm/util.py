"""LDM's face over configs, models and devices, under the names that scripts import from here."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from ldm.cli import run_command
from ldm.config import (
    ALIASES,
    find_file,
    get_obj_from_str,
    instantiate_from_config,
    load_config,
    parameters_of,
    parse_overrides,
    plain,
)
from ldm.devices import best_device, forked_rng
from ldm.errors import InputError, explain, first_line, short

log = logging.getLogger(__name__)

__all__ = [
    "ALIASES", "InputError", "best_device", "count_params", "default", "exists", "explain", "find_file", "first_line",
    "forked_rng", "get_obj_from_str", "instantiate_from_config", "load_config", "load_model_from_config",
    "parameters_of", "parse_overrides", "plain", "run_command", "short",
]  # fmt: skip


def load_model_from_config(
    config: Any, ckpt: str | Path | None = None, verbose: bool = False, unet_dtype: Any = None
) -> Any:
    """The model of a config with the weights of a checkpoint, on the CPU, in evaluation mode.

    Without `ckpt` the config's own `checkpoint` is used. `unet_dtype`: a torch.dtype for the weights of the UNet in
    place of fp32. Raises `InputError`, see `ldm.checkpoints`.
    """
    from ldm.interchange.base_files import reader
    from ldm.models.building import build_model, choose_checkpoint

    model = build_model(config, *choose_checkpoint(config, ckpt), read=reader(config), unet_dtype=unet_dtype).eval()
    if verbose:
        count_params(model, verbose=True)
    return model


def exists(value: Any) -> bool:
    """True unless the value is None."""
    return value is not None


def default(value: Any, fallback: Any) -> Any:
    """`value`, or `fallback` (called if it is a function) where the value is None."""
    if value is not None:
        return value
    return fallback() if inspect.isfunction(fallback) else fallback


def count_params(model: Any, verbose: bool = False) -> int:
    """The number of parameters of a module."""
    total = sum(p.numel() for p in model.parameters())
    if verbose:
        log.info("%s has %.2f M parameters", type(model).__name__, total * 1e-6)
    return total
