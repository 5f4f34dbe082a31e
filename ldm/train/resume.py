"""The state of a run at the end of its last step. With it, a resumed run continues as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.loop import _Loop

from ldm.errors import InputError
from ldm.train.random_states import GENERATORS, random_states, set_random_states


def gathered(trainer: pl.Trainer, value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks."""
    values = [value]
    if trainer.world_size > 1:
        values = [None] * trainer.world_size
        torch.distributed.all_gather_object(values, value)
    return values


def own_of(trainer: pl.Trainer, values: list[Any]) -> Any:
    """This process's value from `gathered`; None if the number of processes has changed."""
    return values[trainer.global_rank] if len(values) == trainer.world_size else None


def without_validation(loops: dict[str, Any]) -> dict[str, Any]:
    """The state of the loops with validation counters of 0, because no checkpoint is written during validation."""
    name = "epoch_loop.val_loop.batch_progress"
    progress = loops["fit_loop"][name]
    nothing = {kind: dict.fromkeys(progress[kind], 0) for kind in ("total", "current")}
    return loops | {"fit_loop": loops["fit_loop"] | {name: nothing | {"is_last_batch": False}}}


def end_epoch(loops: dict[str, Any]) -> bool:
    """If the checkpoint was written after the last batch of an epoch, count the epoch as ended. Returns whether it was.

    A checkpoint is written before Lightning counts the epoch. Without this, a resumed run would count epochs
    differently from a run that was not interrupted.
    """
    batches, epochs = loops["epoch_loop.batch_progress"], loops["epoch_progress"]
    if not (batches["is_last_batch"] and batches["current"]["completed"] < batches["current"]["processed"]):
        return False
    for kind in ("total", "current"):
        batches[kind]["completed"] = batches[kind]["processed"]
        epochs[kind]["processed"] = epochs[kind]["completed"] = epochs[kind]["started"]
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] += 1
    return True


class LastStep(pl.Callback):
    """Keeps the state of the run at the end of its last finished step: counters, data and random states.

    Checkpoints get this state, whenever they are written, so a resumed run repeats the unfinished step. This callback
    must come first. It restores the random states at the first batch, because the setup of a run draws random numbers
    too. The `streams` of the module (see `ldm.models.diffusion.draws`) are the same in all processes.
    """

    def __init__(self) -> None:
        self.step: int | None = None  # the last finished one of this session
        self.stepping = False  # weights are being changed
        self.alone = False  # the other processes do not answer
        self.state: dict[str, Any] = {}
        self.random: dict[str, Any] = {}
        self.streams: list[dict[str, Any]] = []
        self.pending: dict[str, Any] | None = None
        self.begins_epoch = False  # the resumed checkpoint was at the end of an epoch

    def on_before_optimizer_step(self, *_: Any) -> None:
        self.stepping = True

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if self.stepping:
            self.take(trainer, module)

    def take(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the current state of the run."""
        data = trainer.datamodule
        self.state = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "loops": without_validation(trainer._checkpoint_connector._get_loops_state_dict()),
        }
        if data is not None and (state := data.state_dict()):
            self.state[type(data).__qualname__] = state
        self.random = random_states()
        self.streams = [stream.states for stream in getattr(module, "streams", [])]
        self.step, self.stepping = trainer.global_step, False

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.state)
        own = self.random or random_states()
        checkpoint["random_states"] = [own] if self.alone else gathered(trainer, own)
        if self.streams:
            checkpoint["random_streams"] = [self.streams]

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        if unlike := next(_unlike(trainer.fit_loop.state_dict(), loops), None):
            raise InputError(f"the checkpoint is damaged or of another Lightning: loops.fit_loop has no good {unlike}")
        data = trainer.datamodule
        if data is not None and data.state_dict() and type(data).__qualname__ not in checkpoint:
            raise InputError(f"the checkpoint is incomplete: it lacks the state of the data, {type(data).__qualname__}")
        self.begins_epoch = end_epoch(loops)
        states = checkpoint["random_states"]
        own = getattr(module, "streams", [])
        streams = checkpoint.get("random_streams", [[]])[0]
        if own and not streams:  # the checkpoint is of a run with one process; its generators continue as the streams
            streams = [{kind: states[0][name] for kind, name in GENERATORS.items() if states[0].get(name) is not None}]
        if streams and not own:
            named = {GENERATORS[kind]: state for kind, state in streams[0].items()}
            states = [states[0] | named] * trainer.world_size
        for stream, state in zip(own, streams if own else [], strict=True):
            stream.states = state
        self.pending = own_of(trainer, states)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.begins_epoch:  # no batches of an unfinished epoch are to be skipped
            _Loop.restarting.fset(trainer.fit_loop, False)

    def on_train_batch_start(self, *_: Any) -> None:
        if self.pending is not None:
            set_random_states(self.pending)
            self.pending = None


def _unlike(template: Any, found: Any, path: str = "") -> Iterator[str]:
    """The paths at which nested dictionaries lack an entry of the template, or have another type."""
    if isinstance(template, dict) and isinstance(found, dict):
        for name, part in template.items():
            yield from _unlike(part, found.get(name), f"{path}.{name}" if path else name)
    elif type(template) is not type(found):
        yield path
