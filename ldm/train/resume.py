"""What makes a run stop and go on without a trace: safe checkpoints, random states, signals, a guard on the loss."""

from __future__ import annotations

import logging
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from ldm.checkpoints import read_object, save_torch
from ldm.errors import InputError
from ldm.tuning import files

log = logging.getLogger(__name__)


class SafeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written beside and renamed, read without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        save_torch(path, checkpoint)

    def load_checkpoint(self, path: str | Path, *_: Any, **__: Any) -> dict[str, Any]:
        return read_object(path)


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
    """The inverse of `random_states`."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if states.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])


def gathered(trainer: pl.Trainer, value: Any) -> list[Any]:
    """The values that all processes have, in their order."""
    values = [value]
    if trainer.world_size > 1:
        values = [None] * trainer.world_size
        torch.distributed.all_gather_object(values, value)
    return values


def own_of(trainer: pl.Trainer, values: list[Any]) -> Any:
    """This process's part of what `gathered` gave; None where there were more or fewer processes then."""
    return values[trainer.global_rank] if len(values) == trainer.world_size else None


class RandomStates(pl.Callback):
    """Keeps the random states of every process in the checkpoint; a resumed run goes on from them.

    They are put back at the first batch, since setting up a run draws random numbers too.
    """

    def __init__(self) -> None:
        self.pending: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_states"] = gathered(trainer, random_states())

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        states = checkpoint.get("random_states", [])
        self.pending = own_of(trainer, states)
        if self.pending is None:
            log.warning("resuming on %d processes what ran on %d: other random draws", trainer.world_size, len(states))

    def on_train_batch_start(self, *_: Any) -> None:
        if self.pending is not None:
            set_random_states(self.pending)
            self.pending = None


class SaveRun(Checkpoint):
    """Writes `<step>-adapters/` and `last.ckpt` every so many steps, on SIGUSR1, and on leaving.

    A loss that is not finite stops the run before anything is saved. `notes` go into the adapter folders.
    As a `Checkpoint` it comes after all other callbacks.
    """

    def __init__(self, folder: Path, every_n_train_steps: int, notes: dict[str, Any] | None = None) -> None:
        if not isinstance(every_n_train_steps, int) or every_n_train_steps < 1:
            raise InputError(
                f"modelcheckpoint.params.every_n_train_steps must be at least 1, got {every_n_train_steps!r}"
            )
        self.folder, self.every, self.notes = folder, every_n_train_steps, notes or {}
        self.step = 0  # the latest one that is done
        self.asked: int | None = None  # the signal that came last
        self.unchecked: torch.Tensor | None = None  # the sum of the losses since the last look
        self.handlers: dict[int, Any] = {}

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        if trainer.is_global_zero:
            for left in self.folder.glob(".*.tmp-*"):  # of a process that was killed while it saved
                shutil.rmtree(left, ignore_errors=True)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            if number == signal.SIGUSR1 and signal.getsignal(number) is not signal.SIG_DFL:
                continue  # a cluster's requeueing has it
            self.handlers[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: Any) -> None:
        if self.asked == signal.SIGINT == number:  # a second Ctrl-C does not wait for the batch to end
            raise KeyboardInterrupt
        self.asked = number

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = (outputs or {}).get("loss")  # none where the model steps its optimizers itself
        if loss is not None:
            self.unchecked = loss if self.unchecked is None else self.unchecked + loss
        if trainer.global_step == self.step:
            return  # in the midst of accumulated batches, whose gradients no checkpoint holds
        self.step = trainer.global_step
        due = self.step % self.every == 0 or self._ends(trainer)
        if not due and module.device.type == "cuda" and self.step % max(1, trainer.log_every_n_steps):
            return  # to look at the loss is to wait for the device, which works ahead
        self._check(trainer, module)
        asked = self._asked_anywhere(trainer)
        if asked or due:
            self.save(trainer, module)
        if asked in (signal.SIGTERM, signal.SIGINT):
            name, folder = signal.Signals(asked).name, self.folder.parent
            log.info("stopped by %s at step %d; go on with -r %s", name, self.step, folder)
            trainer.should_stop = True

    def _ends(self, trainer: pl.Trainer) -> bool:
        """Whether this is the last batch, as far as one can know."""
        last_of_all = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        return trainer.should_stop or last_of_all or 0 <= trainer.max_steps <= trainer.global_step

    def _asked_anywhere(self, trainer: pl.Trainer) -> int | None:
        """The signal that any of the processes has received since the last batch."""
        asked, self.asked = self.asked, None
        if trainer.world_size > 1:
            everywhere = trainer.strategy.reduce(
                torch.tensor(asked or 0, device=trainer.strategy.root_device), reduce_op="max"
            )
            asked = int(everywhere) or None
        return asked

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raises `InputError`, in all processes, where the losses of any since the last look are not finite.

        A model that steps its optimizers itself gives no losses: there it is the weights that are looked at.
        """
        summed, self.unchecked = self.unchecked, None
        seen = [p for p in module.parameters() if p.requires_grad] if summed is None else [summed]
        bad = [value.detach() for value in seen if not torch.isfinite(value).all()]
        worst = torch.tensor(float(bool(bad)), device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            worst = trainer.strategy.reduce(worst, reduce_op="max")
        if not worst:
            return
        what = f"the loss is {float(summed)}" if bad and summed is not None else "a loss or a weight is not finite"
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        kept = f"the last good checkpoint is {self.last}" if self.last.exists() else "no checkpoint had been written"
        raise InputError(
            f"{what} near step {trainer.global_step} (learning rate {rate:g}); {kept}; "
            "go on with --precision 32, or start again with a lower model.base_learning_rate"
        )

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write what was tuned, if anything was, and everything that a resume needs."""
        if trainer.is_global_zero and getattr(module, "is_tuned", False):
            files.save(module, self.folder / f"{self.step}-adapters", {"step": self.step, **self.notes})
        trainer.save_checkpoint(self.last)
