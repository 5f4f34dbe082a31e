"""Floor 0: the device that computes, and random numbers on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ldm.errors import InputError, first_line


def best_device(wanted: str | None = None) -> Any:
    """The wanted device or, by default, the best one. Raises `InputError` if it is not available."""
    import torch

    if wanted is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        torch.empty(0, device=wanted)
        return torch.device(wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {wanted!r} cannot be used here: {first_line(error)}") from None


def cast_frozen(model: Any, dtype: Any) -> None:
    """Convert the frozen parameters of a module to `dtype`; trainable ones stay as they are."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@contextmanager
def forked_rng(device: Any = None, seed: int | None = None) -> Iterator[None]:
    """A context that restores the random states at its end, of the CPU and, if `device` is a GPU, of the device.

    With a `seed`, random numbers within the context begin at it.
    """
    import torch

    kind = getattr(device, "type", "cpu")
    devices = {"cuda": [device], "mps": [0]}.get(kind, [])  # torch needs a number for the only MPS device
    with torch.random.fork_rng(devices, device_type=kind if devices else "cuda"):
        if seed is not None:
            torch.manual_seed(seed) if devices else torch.default_generator.manual_seed(seed)
        yield
