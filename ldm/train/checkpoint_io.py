"""Writes checkpoints of runs atomically, and refuses to read one that is damaged or incomplete."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.checkpoints import read_object, save_torch
from ldm.errors import InputError, first_line
from ldm.train import manifest as manifests
from ldm.train.random_states import try_random_states

log = logging.getLogger(__name__)


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints with a manifest. They are written beside and renamed, and read without running code.

    Raises `InputError` if a file is damaged, was edited, or lacks something that a resume needs.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_torch(path, checkpoint | {manifests.KEY: manifests.manifest(checkpoint)})

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        content = read_object(path)
        if not isinstance(content, dict):
            raise InputError(f"{path} is no checkpoint of a run: it holds a {type(content).__name__}")
        if manifests.KEY in content:
            manifests.check(content, str(path))
        else:
            log.warning("%s has no manifest, as an earlier version wrote it: damage would not be noticed", path)
        check_complete(content, str(path))
        return content


# The parts of a checkpoint that a resume needs, and their types.
NEEDED = {
    "state_dict": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": dict,
    "callbacks": dict,
    "random_states": list,
    "global_step": int,
    "epoch": int,
}
# Where Lightning counts optimizer steps: with automatic optimization, and with manual optimization.
STEPS = (
    ("epoch_loop.automatic_optimization.optim_progress", "optimizer", "step", "total", "completed"),
    ("epoch_loop.manual_optimization.optim_step_progress", "total", "completed"),
)
COUNTERS = ("epoch_progress", "epoch_loop.batch_progress", *(path[0] for path in STEPS))


def check_complete(content: dict[str, Any], source: str) -> None:
    """Raises `InputError` unless a checkpoint has every part that a resume needs, with the right type."""
    if fault := next(_faults(content), None):
        raise InputError(f"{source} is damaged or incomplete: {fault}; go on from another checkpoint of this run")


def _faults(content: dict[str, Any]) -> Iterator[str]:
    """The faults of a checkpoint. Use only the first one: each check relies on the checks before it."""
    for faults in (_faults_of_parts, _faults_of_weights, _faults_of_loops, _faults_of_optimizers, _faults_of_states):
        yield from faults(content)


def _faults_of_parts(content: dict[str, Any]) -> Iterator[str]:
    for name, kind in NEEDED.items():
        if name not in content:
            yield f"it lacks {name}"
        elif not isinstance(content[name], kind) or isinstance(content[name], bool):
            yield f"{name} is a {type(content[name]).__name__}, expected a {kind.__name__}"


def _faults_of_weights(content: dict[str, Any]) -> Iterator[str]:
    weights = content["state_dict"]
    yield from (f"{name} is no tensor" for name, value in weights.items() if not isinstance(value, torch.Tensor))
    yield from (f"{name} is not finite" for name, value in weights.items() if not torch.isfinite(value).all())


def _faults_of_loops(content: dict[str, Any]) -> Iterator[str]:
    loops = content["loops"].get("fit_loop")
    if not isinstance(loops, dict):
        yield "loops lacks fit_loop"
    yield from (f"loops.fit_loop.{name} does not hold counts" for name in COUNTERS if not _counts(loops.get(name)))
    if content["global_step"] not in [_at(loops, path) for path in STEPS]:
        yield f"global_step is {content['global_step']}, which is not what its loops counted"


def _faults_of_optimizers(content: dict[str, Any]) -> Iterator[str]:
    if not content["optimizer_states"]:
        yield "optimizer_states is empty"
    for state in content["optimizer_states"]:
        groups = state.get("param_groups") if isinstance(state, dict) else None
        if not (isinstance(groups, list) and groups and isinstance(state.get("state"), dict)):
            yield "optimizer_states holds no state of an optimizer"
        if not all(map(_is_group, groups)):
            yield "optimizer_states has groups without parameters or learning rate"
        if not all(isinstance(one, dict) for one in state["state"].values()):
            yield "optimizer_states has a parameter without a state"


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list) and _number(group.get("lr"))


def _faults_of_states(content: dict[str, Any]) -> Iterator[str]:
    for states in content["random_states"]:
        try:
            try_random_states(states)
        except (TypeError, ValueError, KeyError, RuntimeError, AttributeError, OverflowError, IndexError) as error:
            yield f"random_states cannot be read ({first_line(error)})"


def _counts(value: Any) -> bool:
    """Whether nested dictionaries hold counts (whole numbers of at least 0) and nothing else."""
    if isinstance(value, dict):
        return bool(value) and all(map(_counts, value.values()))
    return isinstance(value, int) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)


def _at(value: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
