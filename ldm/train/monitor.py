"""Watches a metric of validation: keeps the best weights, and stops a run that no longer improves."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm import schema
from ldm.config import plain
from ldm.errors import InputError, did_you_mean

log = logging.getLogger(__name__)

PLACE = "lightning.monitor"


class BestSoFar(pl.Callback):
    """Compares a logged metric after each validation; without validation pictures, after each epoch.

    `patience`: after so many values in a row that are no better, the run ends (None: it goes on). `save_best`: whether
    `ldm.train.saving.SaveRun` keeps the best weights. The state goes into checkpoints, so a resumed run counts on.
    Raises `InputError` for a metric that nobody logs.
    """

    def __init__(
        self,
        metric: str = "val/loss",
        mode: str = "min",
        min_delta: float = 0.0,
        patience: int | None = None,
        save_best: bool = False,
    ) -> None:
        self.metric, self.sign, self.min_delta = metric, 1 if mode == "min" else -1, min_delta
        self.patience, self.save_best = patience, save_best
        self.best: float | None = None
        self.best_step = 0
        self.without = 0  # values since the best one
        self.has_ended = False  # this callback has ended the run
        self.improved = False  # at the last value
        self.seen_at: int | None = None  # the step of the last value

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "without": self.without}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("metric") == self.metric:  # another metric begins anew
            self.best, self.best_step, self.without = state["best"], state["best_step"], state["without"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.metric.startswith("val/") and not sum(trainer.num_val_batches):
            raise InputError(
                f"{PLACE}: {self.metric} needs validation pictures: set data.params.validation, or go by another metric"
            )

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.look(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not sum(trainer.num_val_batches):
            self.look(trainer)

    def look(self, trainer: pl.Trainer) -> None:
        """Compare the metric's value with the best one. A run that is already ending, for instance by a signal, is not
        judged: Lightning validates it at a step at which it would not otherwise."""
        self.improved = False
        if trainer.should_stop or trainer.global_step == self.seen_at:
            return
        self.seen_at = trainer.global_step
        value = self.value(trainer)
        self.improved = math.isfinite(value) and (
            self.best is None or self.sign * (self.best - value) > self.min_delta
        )
        if self.improved:
            self.best, self.best_step, self.without = value, trainer.global_step, 0
            return
        self.without += 1
        if self.patience is not None and self.without >= self.patience:
            self.has_ended = trainer.should_stop = True
            best = "never finite" if self.best is None else f"best at step {self.best_step}: {self.best:.4f}"
            log.info("stopped early at step %d: %s is no better after %d more values (%s)",
                     trainer.global_step, self.metric, self.without, best)  # fmt: skip

    def value(self, trainer: pl.Trainer) -> float:
        """The metric, the same in all processes."""
        logged = trainer.callback_metrics
        if self.metric not in logged:
            raise InputError(
                f"{PLACE}.metric: nothing logs {self.metric!r}{did_you_mean(self.metric, sorted(logged))}"
            )
        return float(trainer.strategy.broadcast(float(logged[self.metric])))


def monitor_of(config: DictConfig) -> BestSoFar | None:
    """What watches a metric, if the config asks for it."""
    section = plain(OmegaConf.select(config, PLACE))
    if section is None:
        return None
    asked = schema.Monitor(**section)
    if asked.early_stopping is None and not asked.save_best:
        return None
    return BestSoFar(asked.metric, asked.mode, asked.min_delta, asked.early_stopping, asked.save_best)
