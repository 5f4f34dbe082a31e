"""Training from a config alone, as LDM's main.py does it: first stages, latent diffusion, CLIP; from scratch or not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf

from ldm.config import instantiate_from_config
from ldm.errors import InputError
from ldm.models.building import skip_init
from ldm.schema import Training
from ldm.train import run as runs
from ldm.train import run_folder
from ldm.train.concepts import takes
from ldm.train.run_config import opened, with_trainer
from ldm.train.run_folder import Run

DEFAULTS = Training().model_dump()


def plan(options: argparse.Namespace, trainer_options: dict[str, Any], overrides: list[str]) -> Run:
    """The run that the options ask for: a new one, or one to go on with. Raises `InputError`."""
    config, folder, checkpoint = opened(options, overrides, trainer_options)
    asked = {"seed": options.seed, "scale_lr": options.scale_lr, "keep_memory": options.keep_memory}
    given = {key: value for key, value in asked.items() if value is not None}
    config = OmegaConf.merge({"training": DEFAULTS}, config, {"training": given})
    config = with_trainer(config, options.gpus, trainer_options)
    if takes(config.data.get("target"), "train") and OmegaConf.select(config, "data.params.train") is None:
        raise InputError("the config has no training set: name its class with data.params.train.target=<your dataset>")
    name = options.name or (Path(options.base[0]).stem if options.base else "")
    return Run(
        config=config,
        folder=folder or run_folder.new_folder(options.logdir, options.project, "", name, options.postfix),
        resume=checkpoint,
        seed=config.training.seed,
        scale_lr=config.training.scale_lr,
        keep_memory=config.training.keep_memory,
        debug=options.debug,
    )


def report(run: Run) -> str:
    """What would be trained, without training it. Raises `InputError` for a model that cannot be built."""
    with skip_init():
        model = instantiate_from_config(run.config.model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{count:,} weights learn\nnothing trained: add -t to train in {run.folder}"


def train(run: Run, test: bool = True) -> pl.Trainer:
    """Build the model with fresh weights (its own `ckpt_path` may say otherwise), train it, with `test` test it."""
    pl.seed_everything(run.seed, verbose=False)
    return runs.train(run, instantiate_from_config(run.config.model), test)
