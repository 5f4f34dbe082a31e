"""Saves a run every n steps or minutes, on a signal, and at its end for any reason. What is not finite is refused."""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from ldm.errors import InputError
from ldm.train.monitor import BestSoFar
from ldm.train.resume import LastStep
from ldm.train.run_folder import step_folders
from ldm.train.workers import is_of_lost_peer
from ldm.tuning import files

log = logging.getLogger(__name__)


BEST, BEST_CHECKPOINT = "best-adapters", "best.ckpt"


def averaged(folder: Path) -> Path:
    """Where the averages of the weights in `<step>-adapters` are."""
    return folder.with_name(folder.name.partition("-")[0] + "-averaged")


class SaveRun(Checkpoint):
    """Writes `<step>-adapters/` and `last.ckpt` every n steps, on SIGUSR1, and when the run ends for any reason.

    `every_n_minutes` saves by time, too. `total_limit`: older folders are deleted. `monitor`: its best weights are
    kept. If a loss or a weight is not finite, the run stops before anything is saved. A model with averages writes
    `<step>-averaged/`, too. `notes` go into the adapter folders. `places` are the folder and notes of each training,
    if there are several. Lightning calls a `Checkpoint` after all other callbacks.
    """

    def __init__(
        self,
        folder: Path,
        every_n_train_steps: int,
        notes: dict[str, Any] | None = None,
        places: Sequence[tuple[Path, dict[str, Any]]] | None = None,
        every_n_minutes: float | None = None,
        total_limit: int | None = None,
        monitor: BestSoFar | None = None,
    ) -> None:
        if not isinstance(every_n_train_steps, int) or every_n_train_steps < 1:
            raise InputError(
                f"modelcheckpoint.params.every_n_train_steps must be at least 1, got {every_n_train_steps!r}"
            )
        self.folder, self.every = folder, every_n_train_steps
        self.notes, self.places = notes or {}, places
        self.every_seconds, self.total_limit = 60 * (every_n_minutes or float("inf")), total_limit
        self.monitor = monitor
        self.saved_at = time.monotonic()
        self.done = LastStep()
        self.step = 0  # the last finished step
        self.saved = 0  # the last saved step, of this session or an earlier one
        self.saving = False
        self.is_bad = False  # something is not finite
        self.interrupted = False  # by Ctrl-C, twice
        self.stopped = False  # by a signal
        self.asked: int | None = None  # the last signal
        self.unchecked: torch.Tensor | None = None  # the sum of the losses since the last check
        self.handlers: dict[int, Any] = {}

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.folder = trainer.strategy.broadcast(self.folder)  # the first process has made it, under its own name

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = self.saved = trainer.global_step
        self.saved_at = time.monotonic()
        if trainer.is_global_zero:
            for left in self.folder.glob(".*.tmp-*"):  # left by a process that was killed while it saved
                shutil.rmtree(left, ignore_errors=True)
        self.listen()
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self._ask)

    def listen(self) -> None:
        """Handle SIGUSR1, which would otherwise end the process. A signal before the first step acts after that step.

        An existing handler, such as a cluster's requeueing, is kept.
        """
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            self.handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._ask)

    def _ask(self, number: int, _frame: Any) -> None:
        if self.asked == signal.SIGINT == number:  # a second Ctrl-C does not wait for the end of the batch
            raise KeyboardInterrupt
        self.asked = number
        if number == signal.SIGUSR1 and not self.step:
            log.info("SIGUSR1 before the first step: nothing to save yet; the run will be saved after that step")

    def release_signals(self) -> None:
        for number, handler in self.handlers.items():
            if signal.getsignal(number) == self._ask:  # after an error Lightning has already restored the first handler
                signal.signal(number, handler)
        self.handlers = {}

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.release_signals()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = (outputs or {}).get("loss")  # None if the model steps its optimizers itself
        if loss is not None:
            self.unchecked = loss if self.unchecked is None else self.unchecked + loss
        if trainer.global_step == self.step:
            return  # between accumulated batches; checkpoints do not hold their gradients
        self.done.take(trainer, module)  # callbacks may have drawn random numbers
        self.step = trainer.global_step
        due = self.step % self.every == 0 or self._ends(trainer)
        if not due and module.device.type == "cuda" and self.step % max(1, trainer.log_every_n_steps):
            return  # reading the loss would wait for the device
        self._check(trainer, module)
        if self.asked is None and time.monotonic() - self.saved_at >= self.every_seconds:
            self.asked = signal.SIGUSR1
        asked = self._asked_anywhere(trainer)
        if asked or due:
            self.save(trainer, module)
        if asked in (signal.SIGTERM, signal.SIGINT):
            name, folder = signal.Signals(asked).name, self.folder.parent
            log.info("stopped by %s at step %d; go on with -r %s", name, self.step, folder)
            self.stopped = trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.monitor is None or self.monitor.seen_at != trainer.global_step or trainer.state.fn != "fit":
            return
        if self.monitor.save_best and self.monitor.improved:
            self.save_best(trainer, module)
        if self.saved == self.step:  # the checkpoint lacks the count of this validation
            trainer.save_checkpoint(self.last)

    def _ends(self, trainer: pl.Trainer) -> bool:
        """Whether this is known to be the last batch."""
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
        """Raises `InputError` in all processes if a loss of any process since the last check is not finite.

        A model that steps its optimizers itself returns no loss; then the weights are checked instead.
        """
        summed, self.unchecked = self.unchecked, None
        seen = [p for p in module.parameters() if p.requires_grad] if summed is None else [summed]
        bad = [value.detach() for value in seen if not torch.isfinite(value).all()]
        worst = torch.tensor(float(bool(bad)), device=trainer.strategy.root_device)
        if trainer.world_size > 1:
            worst = trainer.strategy.reduce(worst, reduce_op="max")
        if worst:
            reason = "a loss or a weight is not finite"
            if bad and summed is not None:
                reason = f"the loss is {float(summed)}"
            self._refuse(trainer, reason)

    def _refuse(self, trainer: pl.Trainer, what: str) -> NoReturn:
        """End a run because something is not finite."""
        self.is_bad = True
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        kept = f"the last good checkpoint is {self.last}" if self.last.exists() else "no checkpoint had been written"
        raise InputError(
            f"{what} near step {trainer.global_step} (learning rate {rate:g}); {kept}; "
            "go on with --precision 32, or start again with a lower model.base_learning_rate"
        )

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the tuned weights, if there are any, and everything that a resume needs.

        Raises `InputError` if a weight is not finite; then earlier files stay.
        """
        self.saving = True
        bad = [name for name, p in module.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if bad:
            self._refuse(trainer, f"the weight {bad[0]} is not finite" + f" and {len(bad) - 1} more" * bool(bad[1:]))
        if trainer.is_global_zero:
            self.save_folders(module)
        if self.done.alone:
            content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.checkpoint_io.save_checkpoint(content, self.last)
        else:
            trainer.save_checkpoint(self.last)
        self.saved, self.saving, self.saved_at = self.step, False, time.monotonic()
        if trainer.is_global_zero:
            self.delete_old()

    def save_best(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the weights of this step as the best ones; those of a model without tuning as a checkpoint."""
        if not getattr(module, "is_tuned", False):
            trainer.save_checkpoint(self.folder / BEST_CHECKPOINT)
        elif trainer.is_global_zero:
            notes = {"step": self.step, self.monitor.metric: self.monitor.best, **self.notes}
            with module.ema_scope() if self.monitor.metric.endswith("_ema") else nullcontext():
                files.save(module, self.folder / BEST, notes)

    def delete_old(self) -> None:
        """Delete all but the newest `total_limit` folders of weights."""
        for folder, _ in self.places or [(self.folder, self.notes)]:
            for old in step_folders(folder)[: -self.total_limit] if self.total_limit else ():
                shutil.rmtree(old, ignore_errors=True)
                shutil.rmtree(averaged(old), ignore_errors=True)

    def save_folders(self, module: pl.LightningModule) -> None:
        """Write the tuned weights as folders for sampling."""
        places = self.places or [(self.folder, self.notes)]
        for one, (folder, notes) in zip(getattr(module, "trainings", [module]), places, strict=True):
            if getattr(one, "is_tuned", False):
                notes, place = {"step": self.step, **notes}, folder / f"{self.step}-adapters"
                files.save(one, place, notes)
                if one.use_ema:
                    with one.ema_scope():
                        files.save(one, averaged(place), notes)

    # --- ends that no batch announces: early stopping, errors, a second Ctrl-C

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.step != self.saved:
            self._check(trainer, module)
            self.save(trainer, module)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Save the state after the last finished step, unless it is saved already or cannot be; log which."""
        self.interrupted = isinstance(exception, KeyboardInterrupt)
        if not trainer.is_global_zero:
            return
        self.done.alone = trainer.world_size > 1  # the other processes may not answer
        finished = self.done.step
        if finished is not None and finished != self.saved and not (self.saving or self.is_bad or self.done.stepping):
            self.step = finished
            if self.unchecked is None or torch.isfinite(self.unchecked).all():
                self.save(trainer, module)
        if not is_of_lost_peer(exception):
            log.info("%s: %s", type(exception).__name__, self.kept())

    def kept(self) -> str:
        """A phrase that says what is saved of a run that has ended."""
        if self.done.step is not None and self.done.step == self.saved:
            return f"what was learnt up to step {self.saved} is saved; go on with -r {self.folder.parent}"
        if self.last.exists():
            return f"what was learnt after step {self.saved} is not saved; go on with -r {self.folder.parent}"
        return "nothing was learnt that could be saved"
