"""Lets a resumed run use the optimizer options, learning rates and schedule of its current config."""

from __future__ import annotations

import logging
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer

from ldm.errors import InputError, short

log = logging.getLogger(__name__)

NOT_OPTIONS = ("params", "lr", "initial_lr")


def optimizers_of(module: pl.LightningModule) -> list[Optimizer]:
    """New optimizers, as the config asks for them."""
    configured = module.configure_optimizers()
    if isinstance(configured, tuple):
        configured = configured[0]
    return list(configured) if isinstance(configured, list) else [configured]


def base_rates(optimizer: Optimizer | dict[str, Any]) -> list[float]:
    """The learning rate of each group before any schedule, from an optimizer or its state."""
    groups = optimizer.param_groups if isinstance(optimizer, Optimizer) else optimizer["param_groups"]
    return [float(group.get("initial_lr", group["lr"])) for group in groups]


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group of a new optimizer, without its parameters and learning rate."""
    return [{key: _plain(value) for key, value in group.items() if key not in NOT_OPTIONS}
            for group in optimizer.param_groups]  # fmt: skip


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def name_of(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


class AsConfigured(pl.Callback):
    """Replaces the optimizer options of a checkpoint by those of the current config.

    Options such as the weight decay come from the config. If the config's learning rate has changed, the stored one is
    scaled by the same ratio, so the effect of a schedule or a callback stays. A new schedule begins at the current
    step. Raises `InputError` for another optimizer, because the stored state would not fit it.
    """

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule  # the config's section as plain values; None if it has none
        self.wanted: list[Optimizer] | None = None  # set in a resumed run until its first step
        self.then: dict[str, Any] = {}  # the configuration of the run when it was saved
        self.now: dict[str, Any] = {}

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["configured"] = self.now

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.wanted, states = optimizers_of(module), checkpoint["optimizer_states"]
        self.then = checkpoint.get("configured") or {"rates": [base_rates(state) for state in states]}
        names = [name_of(optimizer) for optimizer in self.wanted]
        if (was := self.then.get("optimizers", names)) != names:
            raise InputError(
                f"the run was trained with {', '.join(was)}, the config now names {', '.join(names)}: the state of one "
                "does not fit the other; set optimizer_config back, or start a new run from the adapters"
            )
        sizes = [[len(group["params"]) for group in one.param_groups] for one in self.wanted]
        if (stored := [[len(group["params"]) for group in state["param_groups"]] for state in states]) != sizes:
            raise InputError(
                f"the optimizer there has groups of {short(stored)} tensors, here they have {short(sizes)}: "
                "families that learn at rates of their own must stay as they were, or start a new run"
            )
        for state, optimizer in zip(states, self.wanted, strict=True):
            if not state["state"] and checkpoint["global_step"] and optimizer.defaults.get("momentum") != 0:
                raise InputError("the checkpoint is incomplete: its optimizer has no state; go on from another one")

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        wanted = self.wanted or trainer.optimizers
        self.now = {
            "options": [options_of(optimizer) for optimizer in wanted],
            "optimizers": [name_of(optimizer) for optimizer in wanted],
            "rates": [base_rates(optimizer) for optimizer in wanted],
            "schedule": self.schedule,
        }
        if self.wanted is None:
            return
        then = self.then.get("options") or [[{}] * len(options) for options in self.now["options"]]
        for optimizer, were, are in zip(trainer.optimizers, then, self.now["options"], strict=True):
            for group, old, new in zip(optimizer.param_groups, were, are, strict=True):
                # Prodigy and others keep state among the options, so only changed options are replaced.
                group.update({key: value for key, value in new.items() if key not in old or old[key] != value})
        if self._has_other_schedule(trainer):
            self._begin_schedule(trainer)
        elif self.then["rates"] != self.now["rates"]:
            self._change_rates(trainer)
        self._refuse_no_rate(trainer)
        self.wanted = None

    def _refuse_no_rate(self, trainer: pl.Trainer) -> None:
        """Raises `InputError` if the schedule has come to its end, so that further steps would change nothing."""
        factors = [factor for one in trainer.lr_scheduler_configs for factor in one.scheduler.lr_lambdas]
        steps = range(trainer.global_step, max(trainer.max_steps, trainer.global_step + 1))
        if factors and not any(factor(step) for factor in factors for step in steps):
            raise InputError(
                f"the schedule of this run has ended: from step {trainer.global_step} on the learning rate would be 0; "
                "give it a new length (schedule.steps=N) or another form (schedule=constant)"
            )

    def _has_other_schedule(self, trainer: pl.Trainer) -> bool:
        if "schedule" in self.then:
            return self.then["schedule"] != self.schedule
        had = any("initial_lr" in group for optimizer in trainer.optimizers for group in optimizer.param_groups)
        return had != bool(trainer.lr_scheduler_configs)  # checkpoints of earlier versions do not say more

    def _change_rates(self, trainer: pl.Trainer) -> None:
        for optimizer, were, rates in zip(trainer.optimizers, self.then["rates"], self.now["rates"], strict=True):
            for group, then, rate in zip(optimizer.param_groups, were, rates, strict=True):
                group["lr"] = rate if group["lr"] == then else group["lr"] * (rate / then)
                if "initial_lr" in group:
                    group["initial_lr"] = rate
            self._set_bases(trainer, optimizer, rates)
        self._tell(trainer, "learning rate")

    def _begin_schedule(self, trainer: pl.Trainer) -> None:
        """Set every group to the rate of the config's schedule at this step; without a schedule, to its own rate."""
        for optimizer, rates in zip(trainer.optimizers, self.now["rates"], strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
                group.pop("initial_lr", None)
                if trainer.lr_scheduler_configs:
                    group["initial_lr"] = rate
            self._set_bases(trainer, optimizer, rates)
        for scheduler in (config.scheduler for config in trainer.lr_scheduler_configs):
            scheduler.last_epoch = trainer.global_step
            for group, rate, factor in zip(
                scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = rate * factor(trainer.global_step)
        self._tell(trainer, "schedule")

    def _set_bases(self, trainer: pl.Trainer, optimizer: Optimizer, rates: list[float]) -> None:
        for config in trainer.lr_scheduler_configs:
            if config.scheduler.optimizer is optimizer:
                config.scheduler.base_lrs = list(rates)
                config.scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _tell(self, trainer: pl.Trainer, what: str) -> None:
        rates = ", ".join(f"{group['lr']:g}" for one in trainer.optimizers for group in one.param_groups)
        log.info("the %s has changed: from step %d on at %s", what, trainer.global_step, rates)
