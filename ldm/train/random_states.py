"""Reads, checks and restores the states of all random number generators of a process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """The states of all random number generators of this process, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Restore the states that `random_states` gave."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if states.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def try_random_states(states: dict[str, Any]) -> None:
    """Check states by loading them into unused generators. Raises the errors of the generators for damaged states."""
    version, numbers, gauss = states["python"]
    random.Random().setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.RandomState().set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.Generator().set_state(states["torch"])
    for name in ("cuda", "mps"):
        if not (states.get(name) is None or isinstance(states[name], torch.Tensor)):
            raise TypeError(f"{name} is a {type(states[name]).__name__}")


GENERATORS = {"cpu": "torch", "cuda": "cuda", "mps": "mps"}  # their names in `random_states`, by the type of device
