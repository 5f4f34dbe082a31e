"""Where a run writes its numbers and pictures: Lightning's loggers, by name."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from torch import Tensor

from ldm import generate, schema
from ldm.config import instantiate_from_config, plain, unet_params
from ldm.errors import InputError, explain
from ldm.train.run_folder import Run
from ldm.writing import printable

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A logger: the package that it needs, and its class with arguments."""

    package: str
    target: str
    arguments: Mapping[str, Any]  # `{folder}` and `{name}` stand for those of the run
    extra: str = ""  # what to install for it


LOGGERS = {
    "tensorboard": Choice("tensorboard", "TensorBoardLogger", {
        "save_dir": "{folder}", "name": "tensorboard", "version": "", "default_hp_metric": False}),
    "csv": Choice("csv", "CSVLogger", {"save_dir": "{folder}", "name": "csv", "version": ""}),
    "wandb": Choice("wandb", "WandbLogger", {"save_dir": "{folder}", "name": "{name}"}, "wandb"),
    "mlflow": Choice("mlflow", "MLFlowLogger", {
        "tracking_uri": "sqlite:///{folder}/mlflow.db", "run_name": "{name}",
        "artifact_location": "{folder}/mlflow"}, "mlflow"),
}  # fmt: skip


def make_logger(run: Run) -> Logger:
    """The config's logger, or TensorBoard in the run's folder. Raises `InputError` if its package is missing."""
    config = plain(run.config.get("lightning", {}).get("logger"))
    if config is None and printable(str(run.folder)) != str(run.folder):
        log.warning("TensorBoard takes no folder whose name is not UTF-8: losses go to %s/csv/metrics.csv", run.folder)
        return by_name("csv", run)
    if config is None or isinstance(config, str):
        return by_name(config or "tensorboard", run)
    with explain("lightning.logger", ImportError, AttributeError):
        extra = {"save_dir": str(run.folder)} if "save_dir" not in (config.get("params") or {}) else {}
        return instantiate_from_config(config, **extra)


def by_name(name: str, run: Run) -> Logger:
    """A row of `LOGGERS`, in the folder of the run."""
    choice = LOGGERS[name]
    try:
        importlib.import_module(choice.package)
    except ImportError:
        raise InputError(
            f"--logger {name} needs the package {choice.package}: pip install 'position-adapters-ldm[{choice.extra}]'"
        ) from None
    values = {
        key: value.format(folder=run.folder.resolve(), name=run.folder.name) for key, value in choice.arguments.items()
        if isinstance(value, str)
    }  # fmt: skip
    cls = getattr(importlib.import_module("pytorch_lightning.loggers"), choice.target)
    return cls(**{**choice.arguments, **values})


def log_picture(logger: Logger, name: str, picture: Tensor, step: int) -> None:
    """Send a picture [3, h, w] in [0, 1] to a logger that takes pictures."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step)
    elif hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(name, [generate.to_pil(picture)], step=step)
    elif hasattr(logger.experiment, "log_image"):  # MLflow
        logger.experiment.log_image(logger.run_id, generate.to_pil(picture), f"{name}/{step:06}.png")


class HyperParameters(pl.Callback):
    """Logs what the config says of a training, one value per dotted key, for tables that compare runs."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        found = hyperparameters(self.run)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # its table has a row for runs with a metric
                logger.log_hyperparams(found, {"hp/max_steps": float(trainer.max_steps)})
            else:
                logger.log_hyperparams(found)


SHOWN = (
    "model.base_learning_rate", "model.params.tuning", "model.params.train_level", "model.params.optimizer_config",
    "model.params.scheduler_config", "model.params.loss", "model.params.learning_rates", "model.params.reg_weight",
    "data.params.batch_size", "data.params.train", "lightning.trainer", "lightning.monitor", "dreambooth",
    "training",
)  # fmt: skip


def hyperparameters(run: Run) -> dict[str, Any]:
    """The values of a config that tell trainings apart, by dotted key; those that are not set are left out."""
    config = plain(run.config)
    found = {place: schema.select(config, place) for place in [*SHOWN, f"{unet_params(config)}.adapter_config"]}
    return {key: value for place, part in found.items() for key, value in _flat(place, part) if value is not None}


def _flat(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flat(f"{place}.{key}", one)
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        for number, one in enumerate(value):
            yield from _flat(f"{place}.{number}", one)
    else:
        yield place, value if isinstance(value, (int, float, str, type(None))) else str(value)
