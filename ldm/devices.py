"""Floor 0: the device that computes, and random numbers on it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldm.errors import InputError, first_line

# Precisions of weights by their short names, and their names in torch.
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def usable_cpus(root: Path = Path("/")) -> int:
    """The CPUs that this process may use: those it may run on, or fewer by the quota of its container (cgroup)."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([own, *_quotas(root)]))


def _quotas(root: Path) -> Iterator[int]:
    """The quotas of this process's control groups and of those around them, in CPUs, rounded up."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, kinds, inner = line.split(":", 2)
        if kinds and "cpu" not in kinds.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if kinds else "")  # version 1 has a tree for each kind, version 2 one
        place = Path(inner.strip("/"))
        for folder in (top / part for part in (place, *place.parents)):
            try:
                if kinds:
                    quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
            except (OSError, ValueError):
                continue
            if quota.strip().isdecimal() and int(period):
                yield math.ceil(int(quota) / int(period))


def limit_threads(processes: int = 1) -> None:
    """Use no more threads than there are CPUs for each of `processes`, unless OMP_NUM_THREADS says how many.

    torch knows nothing of quotas: in a container with 2 of 64 CPUs it would use 64 threads, which wait for each other.
    """
    import torch

    most = max(1, usable_cpus() // processes)
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > most:
        torch.set_num_threads(most)


def best_device(wanted: str | None = None) -> Any:
    """The wanted device or, by default, the best one. Raises `InputError` if it is not available."""
    import torch

    if wanted is None:
        wanted = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=wanted)
        if torch.device(wanted).type == "cpu":
            limit_threads()
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
