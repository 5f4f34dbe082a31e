"""What a run says while it goes on: one progress bar, or lines where there is no terminal; and what it measures."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

log = logging.getLogger(__name__)

LINES = 20  # at most, about the progress of a run


def length_of(trainer: pl.Trainer) -> int | None:
    """The optimizer steps of the whole run; None if no limit is set."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps > 0 else None


class RunBar(ProgressBar):
    """One bar over the steps of the whole run, with the time that is left; none for validation.

    It is drawn on a terminal alone. `every`: steps between two looks at the loss, for which the device is waited for.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every, self.is_enabled = every, True
        self.bar: tqdm | None = None

    def disable(self) -> None:
        self.is_enabled = False

    def enable(self) -> None:
        self.is_enabled = True

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        is_seen = self.is_enabled and trainer.is_global_zero and sys.stderr.isatty()
        self.bar = tqdm(desc="training", total=length_of(trainer), initial=trainer.global_step, unit="step",
                        dynamic_ncols=True, disable=not is_seen)  # fmt: skip

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        done = trainer.global_step
        if self.bar is None or self.bar.disable or done == self.bar.n:
            return
        if done % self.every == 0 or done == self.bar.total:
            self.bar.set_postfix(self.get_metrics(trainer, module), refresh=False)
            self.bar.update(done - self.bar.n)

    def get_metrics(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        return {name: value for name, value in super().get_metrics(trainer, module).items() if name != "v_num"}

    def on_train_end(self, *_: Any) -> None:
        self._close()

    def on_exception(self, *_: Any) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class EpochReport(pl.Callback):
    """Logs a line at the end of an epoch: mean loss, validation loss, steps per second, peak memory of the device.

    Of many short epochs only some get a line, so that a run has about `LINES`. With `between`, a long epoch has lines
    in between, with the time that is left.
    """

    def __init__(self, between: bool = False) -> None:
        self.between = between
        self.seconds, self.steps = 0.0, 0  # of all epochs that have ended
        self.total: int | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.total = length_of(trainer)
        self.told_epoch = trainer.current_epoch - 1
        self._begin(trainer, module)
        self.on_train_epoch_start(trainer, module)  # Lightning does not call it for the rest of a resumed epoch

    def _begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin what the next line is about."""
        self.since, self.told_step, self.seen_step = time.perf_counter(), trainer.global_step, trainer.global_step
        self.losses: list[Tensor] = []
        self.validated: dict[str, float] = {}
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.start, self.first_step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        if outputs and "loss" in outputs:
            # The loss is still on the device. Lightning has divided it by the number of accumulated batches.
            self.losses.append(outputs["loss"] * trainer.accumulate_grad_batches)
        if trainer.global_step == self.seen_step:
            return
        self.seen_step = trainer.global_step
        if self.between and not trainer.is_last_batch and self._is_due(trainer):
            self._tell(trainer, module, f"epoch {trainer.current_epoch}")

    def _is_due(self, trainer: pl.Trainer) -> bool:
        """Whether so many steps were done since the last line that there will not be more lines than `LINES`."""
        done = trainer.global_step
        if self.total is None:
            return done - self.told_step >= done / 10  # ever more rarely
        return done - self.told_step >= self.total / LINES

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if "val/loss" in trainer.callback_metrics:
            self.validated = {"val/loss": float(trainer.callback_metrics["val/loss"])}
            if not math.isfinite(self.validated["val/loss"]):
                log.warning("the loss of validation is %s at step %d", self.validated["val/loss"], trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.seconds += time.perf_counter() - self.start
        self.steps += trainer.global_step - self.first_step
        epoch, first = trainer.current_epoch, self.told_epoch + 1
        is_end = trainer.should_stop or trainer.global_step == self.total
        is_early = trainer.global_step >= 2 * self.told_step  # the first lines come soon, the others more rarely
        has_news = bool(self.losses or self.validated)  # else a line within the epoch has told all of it
        if has_news and (is_early or is_end or self._is_due(trainer)):
            self._tell(trainer, module, f"epoch {epoch}" if first == epoch else f"epochs {first} to {epoch}")
            self.told_epoch = epoch

    def _tell(self, trainer: pl.Trainer, module: pl.LightningModule, what: str) -> None:
        done, steps, seconds = trainer.global_step, trainer.global_step - self.told_step, self._seconds()
        values = {"loss": trainer.strategy.reduce(torch.stack(self.losses).mean())} if self.losses else {}
        values |= self.validated
        if trainer.is_global_zero:
            left = ""
            if self.total is not None and steps:
                rest = timedelta(seconds=round((self.total - done) * seconds / steps))
                left = f", step {done} of {self.total}" + (f", {rest} left" if rest else "")
            log.info(
                "%s: %s%d steps in %.1f s (%.2f steps/s)%s, peak memory %.2f GiB (%s)", what,
                "".join(f"{name} {float(value):.4f}, " for name, value in values.items()),
                steps, seconds, steps / seconds, left, peak_memory(module.device), module.device.type,
            )  # fmt: skip
        self._begin(trainer, module)

    def _seconds(self) -> float:
        return max(time.perf_counter() - self.since, 1e-9)


class Measures(pl.Callback):
    """Logs the norm of all gradients, before they are clipped, and the peak memory, whenever the losses are logged.

    Both are logged behind the batch: Lightning forgets what a first batch has logged if another hook logs meanwhile.
    """

    def __init__(self) -> None:
        self.found: dict[str, Tensor | float] = {}

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        every = max(1, trainer.log_every_n_steps)
        if (trainer.global_step + 1) % every or not trainer.loggers:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            norms = [torch.linalg.vector_norm(one.detach().float()) for one in gradients]
            self.found["train/grad_norm"] = torch.linalg.vector_norm(torch.stack(norms))
        self.found["memory/peak_gib"] = peak_memory(module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        module.log_dict(self.found)
        self.found = {}


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: on a CUDA device since the last reset, on other devices since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
