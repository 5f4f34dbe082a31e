"""Floor 0: which device computes, and random numbers that are set aside on it."""

from __future__ import annotations

from typing import Any

from ldm.errors import InputError, first_line


def best_device(wanted: str | None = None) -> Any:
    """The device asked for or, by default, the best one there is. Raises `InputError` if it is not there."""
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
    """Put the parameters of a module that do not learn into `dtype`; those that learn stay as they are."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def forked_rng(device: Any) -> Any:
    """A context that leaves the random numbers of the CPU and, if it is a GPU, of `device` as they were."""
    import torch

    if device.type == "mps":  # has one device, which goes without saying, but not to torch
        return torch.random.fork_rng(devices=[0], device_type="mps")
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
