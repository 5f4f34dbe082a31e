"""The state of a training on the device, in files small enough to carry."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints import read_weights, save_safetensors
from ldm.errors import InputError
from ldm.muon import Muon
from scripts.sd_mini.on_device.training import Averages

PART_BYTES = 15 * 10**6  # of one file
NAME = "state-{:02d}-of-{:02d}.safetensors"


def parts_of(tensors: dict[str, Tensor]) -> Iterable[dict[str, Tensor]]:
    """The tensors in their order, in dictionaries of at most `PART_BYTES` each."""
    part, size = {}, 0
    for name, tensor in tensors.items():
        if part and size + tensor.nbytes > PART_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.nbytes
    yield part


def save_state(folder: Path, optimizer: Muon, averages: Averages, steps: int) -> None:
    """Write parameters, averages, optimizer state and the number of steps so far."""
    tensors = {"steps": torch.tensor(steps), "updates": torch.tensor(averages.updates)}
    for i, (parameter, average) in enumerate(zip(averages.parameters, averages.values, strict=True)):
        tensors |= {f"parameter.{i}": parameter.detach(), f"average.{i}": average}
        tensors |= {f"optimizer.{i}.{key}": value for key, value in optimizer.state[parameter].items()}
    parts = list(parts_of({name: tensor.cpu().clone() for name, tensor in tensors.items()}))
    for old in folder.glob("state-*.safetensors"):
        old.unlink()
    for i, part in enumerate(parts):
        save_safetensors(folder / NAME.format(i + 1, len(parts)), part)


@torch.no_grad()
def load_state(folder: Path, optimizer: Muon, averages: Averages) -> int:
    """Restore what `save_state` wrote; the number of steps so far, 0 if there is no state.

    Raises `InputError` where a part is missing or belongs to another model.
    """
    if not (tensors := _read_parts(folder)):
        return 0
    for i, (parameter, average) in enumerate(zip(averages.parameters, averages.values, strict=True)):
        for target, name in ((parameter, f"parameter.{i}"), (average, f"average.{i}")):
            if name not in tensors or tensors[name].shape != target.shape:
                raise InputError(f"{folder} is the state of another model: {name} is missing or of another shape")
            target.copy_(tensors[name])
        prefix = f"optimizer.{i}."
        kept = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        # A fused AdamW counts on the device; otherwise, and for matrices, the count is read by the host.
        is_counted_there = bool(optimizer.defaults.get("fused")) and parameter.dim() < 2
        host = torch.device("cpu")
        optimizer.state[parameter] = {
            key: value.to(parameter.device if key != "step" or is_counted_there else host, copy=True)
            for key, value in kept.items()
        }
    averages.updates = int(tensors["updates"])
    return int(tensors["steps"])


def _read_parts(folder: Path) -> dict[str, Tensor]:
    """The tensors of all parts of a state; empty where there is none. Raises `InputError` where a part is missing."""
    files = sorted(folder.glob("state-*.safetensors"))
    counts = {match[1] for file in files if (match := re.search(r"-of-(\d+)\.", file.name))}
    if files and counts != {f"{len(files):02d}"}:
        raise InputError(f"{folder} has {len(files)} parts of a state of {', '.join(sorted(counts))}; bring all parts")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_weights(file)
    return tensors
