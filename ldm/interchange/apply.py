"""Adds changes, a mapping from parameter names to tensors, to the weights of a model, and takes them out exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldm.checkpoints import refuse_not_finite
from ldm.errors import InputError
from ldm.interchange import lora as loras
from ldm.interchange.lora import Lora


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by the names that checkpoints give them."""
    return {n: p for n, p in model.state_dict(keep_vars=True).items() if isinstance(p, nn.Parameter)}


def lora_changes(lora: Lora, model: nn.Module, source: str = "the LoRA") -> dict[str, Tensor]:
    """The changes of a LoRA for the weights of a model. Raises `InputError` if it was made for another base model."""
    return loras.changes(lora, parameters(model), source)


def add(model: nn.Module, changes: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """Add strength * change to the weights, computed in fp32. Returns the old weights, for `restore`.

    The old values are kept, not overwritten: they may be mapped from a checkpoint's file.
    """
    own = parameters(model)
    if lost := [name for name in changes if name not in own]:
        raise InputError(f"this model has no weights {', '.join(lost[:3])} ({len(lost)} such)")
    _refuse_overflow(changes)
    originals = {}
    for name, change in changes.items():
        parameter = own[name]
        originals[name] = parameter.data
        summed = parameter.data.float() + strength * change.to(parameter.device, torch.float32)
        parameter.data = summed.to(parameter.dtype)
    return originals


def _refuse_overflow(changes: Mapping[str, Tensor]) -> None:
    """Raises `InputError` for changes that are not finite, as of factors whose product is too large."""
    refuse_not_finite(changes, "the change of the weights", "the numbers in the file are too large")


def restore(model: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Put back the old weights, bit for bit."""
    own = parameters(model)
    for name, value in originals.items():
        own[name].data = value


@contextmanager
def added(model: nn.Module, changes: Mapping[str, Tensor], strength: float = 1.0) -> Iterator[None]:
    """Within this context, a model has changed weights."""
    originals = add(model, changes, strength)
    try:
        yield
    finally:
        restore(model, originals)


def merged(weights: Mapping[str, Tensor], changes: Mapping[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """The same for a checkpoint's weights by name: a copy with the changes in it."""
    _refuse_overflow(changes)
    result = dict(weights)
    for name, change in changes.items():
        result[name] = (weights[name].float() + strength * change).to(weights[name].dtype)
    return result
