"""Floor 2: what learns, in one answer.

A family of parameter-efficient tuning is one file here, chosen by its dotted `target` in YAML. It answers two
questions: `install(model)` attaches what it needs, `trainable(model)` names what learns. The second answer freezes the
rest, fills the optimizer, is saved, is loaded and is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from ldm.util import InputError, instantiate_from_config, short

# `train_level` of the published YAML files, as shorthand.
LEVELS = {
    "adapter": "ldm.tuning.position.PositionAdapters",
    "unet": "ldm.tuning.full.UNet",
    "embeder": "ldm.tuning.full.ConditionStage",
}


class Family(Protocol):
    """One way of tuning a latent diffusion model."""

    def install(self, model: nn.Module) -> None:
        """Attach what the family needs to the model."""

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What learns, by state-dict name."""


def families(train_level: str | Sequence[str] | None, tuning: Mapping | Sequence[Mapping] | None) -> list[Family]:
    """The families that a config names: `tuning: [{target, params}, ...]` and/or the shorthand `train_level`."""
    levels = [train_level] if isinstance(train_level, str) else list(train_level or [])
    for level in levels:
        if level not in LEVELS:
            raise InputError(f"train_level has {level!r}: expected {', '.join(LEVELS)}, or tuning: [{{target: ...}}]")
    chosen: list[Any] = [{"target": LEVELS[level]} for level in levels]
    chosen += [tuning] if isinstance(tuning, Mapping) else list(tuning or [])
    built = [instantiate_from_config(config) for config in chosen]
    for config, family in zip(chosen, built, strict=True):
        if not (hasattr(family, "install") and hasattr(family, "trainable")):
            raise InputError(
                f"tuning: {short(config['target'])} is not a family: it needs install(model) and trainable(model)"
            )
    return built


def trainable(model: nn.Module, chosen: Iterable[Family]) -> dict[str, nn.Parameter]:
    """What learns under all the chosen families, each parameter once, by state-dict name."""
    return {name: value for family in chosen for name, value in family.trainable(model).items()}


def freeze_rest(model: nn.Module, learning: Mapping[str, nn.Parameter]) -> None:
    """Gradients for the given parameters and for no others."""
    model.requires_grad_(False)
    for parameter in learning.values():
        parameter.requires_grad_(True)


def named(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """The parameters whose state-dict name is wanted; one that several names share, under the first."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter) and wanted(name):
            found.setdefault(id(value), (name, value))
    return dict(found.values())
