"""Optimizers and schedules by name, from the sections `optimizer` and `schedule` of a config.

`optimizer: prodigy` is short for the target and arguments under `model.params.optimizer_config` that a row of
`OPTIMIZERS` lists. A run stores the long form, so a stored config keeps its meaning.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm import schema
from ldm.config import plain
from ldm.errors import InputError


class Choice(NamedTuple):
    """An optimizer: its class, the package that has it, and arguments that differ from the class's own defaults."""

    target: str
    package: str = "torch"
    params: dict[str, Any] = {}
    finds_rate: bool = False  # it finds the learning rate; the given one is a factor, usually 1


OPTIMIZERS = {
    "adamw": Choice("torch.optim.AdamW"),  # arXiv 1711.05101
    "adamw_fused": Choice("torch.optim.AdamW", params={"fused": True}),
    "adamw8bit": Choice("bitsandbytes.optim.AdamW8bit", "bitsandbytes"),  # arXiv 2110.02861
    "paged_adamw8bit": Choice("bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes"),  # arXiv 2305.14314
    "prodigy": Choice(  # arXiv 2306.06101; its README's settings for diffusion models
        "prodigyopt.Prodigy", "prodigyopt",
        {"use_bias_correction": True, "safeguard_warmup": True, "weight_decay": 0.01}, finds_rate=True,
    ),
    "dadapt_adam": Choice("dadaptation.DAdaptAdam", "dadaptation", {"decouple": True}, finds_rate=True),  # 2301.07733
    "lion": Choice("lion_pytorch.Lion", "lion-pytorch"),  # arXiv 2302.06675
    "adafactor": Choice("torch.optim.Adafactor"),  # arXiv 1804.04235
    "schedulefree_adamw": Choice("schedulefree.AdamWScheduleFree", "schedulefree"),  # arXiv 2405.15682
    "muon": Choice("ldm.muon.Muon"),
    "sgd": Choice("torch.optim.SGD", params={"momentum": 0.9}),
}  # fmt: skip
NAMED = "ldm.lr_scheduler.NamedSchedule"
SMALLEST_FACTOR = 0.1  # a smaller value is probably a learning rate, not a factor


def spell_out(config: DictConfig) -> None:
    """Turn the sections `optimizer`, `schedule` and `loss` of a config into parameters of its model, in place.

    Raises `InputError` for an unknown name, a missing package, and a learning rate that does not suit the optimizer.
    """
    sections = {name: plain(config.get(name)) for name in ("optimizer", "schedule", "loss")}
    for name, section in sections.items():
        if section is not None:
            kind = {"optimizer": schema.Optimizer, "schedule": schema.Schedule, "loss": schema.Loss}[name]
            section = {"name": section} if isinstance(section, str) else section
            schema.check_part(kind, section, name)
            for place, value in SPELLED_OUT[name](section, config).items():
                OmegaConf.update(config, place, value, merge=False, force_add=True)
            config.pop(name)


def _loss(section: dict[str, Any], config: DictConfig) -> dict[str, Any]:
    return {f"model.params.loss.{key}": value for key, value in section.items()}


def _optimizer(section: dict[str, Any], config: DictConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if section.get("rates"):
        found["model.params.learning_rates"] = section["rates"]
    name = section.get("name")
    if name is None:
        return found
    if name not in OPTIMIZERS:
        raise InputError(f"there is no optimizer {name!r}: expected {', '.join(OPTIMIZERS)}")
    choice, rate = OPTIMIZERS[name], OmegaConf.select(config, "model.base_learning_rate")
    if importlib.util.find_spec(choice.target.partition(".")[0]) is None:
        raise InputError(f"the optimizer {name} is in the package {choice.package}: pip install {choice.package}")
    if choice.finds_rate and isinstance(rate, (int, float)) and rate < SMALLEST_FACTOR:
        raise InputError(
            f"{name} finds the learning rate by itself; model.base_learning_rate is a factor of it, and {rate:g} would "
            "train almost nothing: add model.base_learning_rate=1"
        )
    params = choice.params | (section.get("params") or {})
    return found | {"model.params.optimizer_config": {"target": choice.target, "params": params}}


def _schedule(section: dict[str, Any], config: DictConfig) -> dict[str, Any]:
    was = plain(OmegaConf.select(config, "model.params.scheduler_config")) or {}
    if "name" not in section and was.get("target") == NAMED:  # of a resumed run, which another length goes on with
        section = {**(was.get("params") or {}), **section}
    asked = schema.Schedule(**section)
    steps = asked.steps or OmegaConf.select(config, "lightning.trainer.max_steps")
    if asked.name.startswith("constant"):
        steps = None
    elif not isinstance(steps, int) or steps < 1:
        raise InputError(f"the schedule {asked.name} needs its length: set schedule.steps or --max_steps")
    elif asked.warmup >= steps:
        raise InputError(f"schedule.warmup is {asked.warmup} steps, but the schedule has {steps}")
    params = {**asked.model_dump(), "steps": steps}
    return {"model.params.scheduler_config": {"target": NAMED, "params": params}}


SPELLED_OUT = {"optimizer": _optimizer, "schedule": _schedule, "loss": _loss}


class OptimizerModes(pl.Callback):
    """Switches schedule-free optimizers (arXiv 2405.15682) between their two points: training, and the average.

    Between steps the model has the average, so checkpoints, samples and validation use the average.
    """

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._switch(trainer, "train")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._switch(trainer, "eval")

    def _switch(self, trainer: pl.Trainer, mode: str) -> None:
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()
