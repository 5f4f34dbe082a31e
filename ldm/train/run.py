"""One training run from its config to its last checkpoint. Commands parse options, call this, and report."""

from __future__ import annotations

import contextlib
import logging
import os
import pdb
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, ProgressBar, Timer
from pytorch_lightning.utilities import rank_zero_only
from tqdm.contrib.logging import logging_redirect_tqdm

from ldm import schema
from ldm.config import instantiate_from_config, plain
from ldm.data.class_images import missing_class_images
from ldm.devices import cast_frozen, limit_threads
from ldm.errors import InputError, WriteError
from ldm.generate import Settings, fill_class_folder
from ldm.interchange.base_files import reader
from ldm.models.building import build_model, choose_checkpoint
from ldm.models.diffusion.draws import Stream
from ldm.train import caches, lock
from ldm.train.callbacks import ImageLogger
from ldm.train.checkpoint_io import SafeCheckpointIO
from ldm.train.datamodule import DataModuleFromConfig
from ldm.train.loggers import HyperParameters, make_logger
from ldm.train.memory import keep_freed_memory
from ldm.train.monitor import monitor_of
from ldm.train.optimizers import OptimizerModes
from ldm.train.rates import AsConfigured
from ldm.train.reporting import EpochReport, Measures, RunBar
from ldm.train.run_folder import KeepConfigs, Run, claim_folder, last_good
from ldm.train.saving import SaveRun
from ldm.train.trainer_section import PRECISIONS, computes_on_cpu, first_device, trainer_options
from ldm.train.workers import Workers
from ldm.tuning import UNET
from ldm.writing import why

log = logging.getLogger(__name__)

if rank_zero_only.rank:  # only the first process logs
    logging.getLogger("ldm").setLevel(logging.ERROR)
# Lightning's hints do not apply here: batches resume by their number, and pictures are usually cached.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
for message in (
    ".*dataloader is not resumable.*",
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec.*",
    ".*in eval mode at the start of training.*",
    ".*Total length of `list` across ranks is zero.*",  # a config without validation pictures
):
    warnings.filterwarnings("ignore", message)


# --- parts

def learning_rate(run: Run, processes: int) -> float:
    """The config's base learning rate; with `scale_lr`, times processes, batch size and accumulated batches."""
    base = run.config.model.get("base_learning_rate")
    if not isinstance(base, (int, float)) or isinstance(base, bool) or base <= 0:
        raise InputError(f"model.base_learning_rate must be a positive number, got {base!r}")
    if not run.scale_lr:
        return float(base)
    accumulated = trainer_options(run.config).get("accumulate_grad_batches") or 1
    batch = run.config.data.params.batch_size
    log.info("learning rate %g = %g x %d processes x batch %d x %d accumulated", base * processes * batch * accumulated,
             base, processes, batch, accumulated)  # fmt: skip
    return float(base) * processes * batch * accumulated


def make_callbacks(run: Run, saver: SaveRun) -> list[pl.Callback]:
    """The config's callbacks and the callbacks of every run."""
    section = run.config.get("lightning", {})
    callbacks = [instantiate_from_config(config) for config in (section.get("callbacks") or {}).values() if config]
    for callback in callbacks:
        if isinstance(callback, ImageLogger):
            callback.folders = [one.folder / "images" for one in run.parts or [run]]
    own_bar = not any(isinstance(one, ProgressBar) for one in callbacks)
    if own_bar and trainer_options(run.config).get("enable_progress_bar") is not False:
        callbacks.append(RunBar(10 if torch.cuda.is_available() else 1))  # showing the loss waits for the device
    schedule = plain(OmegaConf.select(run.config, "model.params.scheduler_config"))
    lines = EpochReport(between=not sys.stderr.isatty())
    own = [AsConfigured(schedule), OptimizerModes(), KeepConfigs(run), lines, LearningRateMonitor("step")]
    own += [Measures(), *(HyperParameters(one) for one in run.parts[:1] or [run])]
    watching = [saver.monitor] if saver.monitor else []
    return [saver.done, *callbacks, *watching, *own, saver]


def saver_of(run: Run, places: Sequence[tuple[Path, dict[str, Any]]] | None = None) -> SaveRun:
    """What saves the run, as the config says. `places` are the folders and notes of trainings side by side."""
    section = plain(OmegaConf.select(run.config, "lightning.modelcheckpoint.params")) or {}
    usual = schema.CheckpointParams().every_n_train_steps
    every, monitor = section.get("every_n_train_steps"), monitor_of(run.config)
    if monitor is not None and places:
        raise InputError("lightning.monitor stops one training; trainings side by side end together, so leave it out")
    return SaveRun(
        run.checkpoints,
        usual if every is None else every,
        run.notes,
        places,
        every_n_minutes=section.get("every_n_minutes"),
        total_limit=section.get("total_limit"),
        monitor=monitor,
    )


def make_trainer(run: Run, saver: SaveRun, automatic: bool = True) -> pl.Trainer:
    """Lightning's Trainer. Raises `InputError` for options that contradict each other or the machine."""
    options = {"num_sanity_val_steps": 0, "log_every_n_steps": 10} | trainer_options(run.config, automatic)
    try:
        return pl.Trainer(
            **options,
            use_distributed_sampler=False,
            logger=make_logger(run),
            callbacks=make_callbacks(run, saver),
            plugins=[SafeCheckpointIO()],
            enable_model_summary=False,
        )
    except (pl.utilities.exceptions.MisconfigurationException, TypeError, ValueError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"Lightning's Trainer refuses its options: {' '.join(str(error).split())}") from None


# --- the run

def prepare_class_pictures(run: Run, model: Any, folder: Path, prompt: str, number: int) -> None:
    """Fill the class folder with pictures of the base model. The first process does it; the others wait for it."""
    if rank_zero_only.rank == 0:
        settings = Settings(scale=run.config.dreambooth.class_scale)
        fill_class_folder(model.to(first_device(run.config)), folder, prompt, number, settings, run.seed)
        model.cpu()
    while missing_class_images(folder, number):
        time.sleep(2)


def train(run: Run, model: pl.LightningModule, test: bool = True) -> pl.Trainer:
    """Train `model` as the config says; with `test`, evaluate it on the test set. Returns the trainer.

    A training that was asked to stop skips the test set; a later resume evaluates it at the end.
    """
    data = instantiate_from_config(run.config.data)
    if run.resume is None:
        claim_folder(run)
    saver = saver_of(run)
    with unless_refused(run, saver):
        trainer = fit(run, model, data, saver)
    if trainer.is_global_zero and is_over(trainer, saver):
        finish(run, model)
    if test and OmegaConf.select(run.config, "data.params.test") is not None and is_over(trainer, saver):
        trainer.validate(model, data.test_dataloader())
    return trainer


def is_over(trainer: pl.Trainer, saver: SaveRun) -> bool:
    """Whether a run has reached its end; it has not if a signal or a limit of time has stopped it."""
    left = [one.time_remaining() for one in trainer.callbacks if isinstance(one, Timer)]
    return not saver.stopped and all(seconds is None or seconds > 0 for seconds in left)


def fit(run: Run, module: pl.LightningModule, data: DataModuleFromConfig, saver: SaveRun) -> pl.Trainer:
    """Train `module` on `data`: one training or, with `run.parts`, several side by side."""
    trainer = make_trainer(run, saver, module.automatic_optimization)
    pl.seed_everything(run.seed + trainer.global_rank, verbose=False)  # dropout differs between processes
    if trainer.world_size > 1 and getattr(module, "streams", None) == ():
        module.streams = [Stream(run.seed)]  # all processes share the noise, see `ldm.models.diffusion.draws`
    trainings = getattr(module, "trainings", [module])
    for one, part in zip(trainings, run.parts or [run], strict=True):
        one.learning_rate = learning_rate(part, trainer.world_size)
    module.learning_rate = trainings[0].learning_rate
    device = trainer.strategy.root_device
    if device.type == "cpu":
        limit_threads(getattr(trainer.strategy, "num_processes", 1))
        if run.keep_memory:
            keep_freed_memory()
    if run.base_precision != "fp32":
        cast_base(module, trainings, run.base_precision, trainer)
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    log.info("%s: %s weights learn, learning rate %g", run.folder, f"{count:,}", module.learning_rate)
    with failures_explained(run, saver, trainer), lock.held(run.folder), contextlib.ExitStack() as stack:
        if sys.stderr.isatty():
            stack.enter_context(logging_redirect_tqdm())  # lines of the log appear above the bar
        with before_the_first_step():
            stack.enter_context(caches.encoded(trainings, data, run.cache, device))
        stack.enter_context(Workers(saver.kept).watched(trainer))
        trainer.fit(module, data, ckpt_path=str(run.resume) if run.resume else None)
    return trainer


def cast_base(
    module: pl.LightningModule, trainings: Sequence[pl.LightningModule], precision: str, trainer: pl.Trainer
) -> None:
    """Round the frozen weights of the UNet to `precision`. Raises `InputError` where its own weights are trained."""
    if trainer.strategy.root_device.type == "cpu" and not computes_on_cpu(precision):
        log.warning("this CPU emulates %s slowly; --base_precision fp32 is faster", precision)
    for one in trainings:
        refuse_mixed(one, trainer.precision)
    cast_frozen(module.model.diffusion_model, PRECISIONS[precision])


@contextlib.contextmanager
def failures_explained(run: Run, saver: SaveRun, trainer: pl.Trainer) -> Iterator[None]:
    """Within this context, write errors name the last good checkpoint. `run.debug`: any error opens the debugger."""
    try:
        yield
    except SystemExit:
        if saver.interrupted:  # Lightning's exit code for it is 1
            raise KeyboardInterrupt from None
        raise
    except OSError as error:
        path = error.filename or run.folder
        raise WriteError(os.fsdecode(path), why(error, run.folder), kept=last_good(run)) from error
    except WriteError as error:
        raise WriteError(error.path, error.reason, kept=last_good(run)) from error
    except Exception:
        if run.debug and trainer.is_global_zero:
            pdb.post_mortem()
        raise
    finally:
        saver.release_signals()


def finish(run: Run, module: pl.LightningModule) -> None:
    """Call `finish` of the families at the end of a training, with the folder of its run."""
    trainings = getattr(module, "trainings", [module])
    for one, part in zip(trainings, run.parts or [run], strict=True):
        for chosen in one.tuning.families if hasattr(one, "tuning") else ():
            if hasattr(chosen.family, "finish"):
                chosen.family.finish(one, part.folder)


@contextlib.contextmanager
def unless_refused(run: Run, saver: SaveRun) -> Iterator[None]:
    """Within this context, an error before the first step deletes the folder of a new run.

    From here on SIGUSR1 does not end the run.
    """
    saver.listen()
    try:
        with before_the_first_step(saver):
            yield
    except Exception:
        if run.resume is None and not saver.step and rank_zero_only.rank == 0:
            shutil.rmtree(run.folder, ignore_errors=True)
        raise
    finally:
        saver.release_signals()


@contextlib.contextmanager
def before_the_first_step(saver: SaveRun | None = None) -> Iterator[None]:
    """If the run is stopped within this context and before the first step of `saver`, log that nothing was trained."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if (saver is None or saver.done.step is None) and not getattr(stop, "is_told", False):
            log.info("stopped before the first step: nothing was learnt, nothing is saved")
            stop.is_told = True
        raise


def refuse_mixed(model: pl.LightningModule, precision: str) -> None:
    """Raises `InputError` if some weights of the UNet itself are trained in fp32 beside others in half precision."""
    own = [name for name in model.tuning.parameters() if name.startswith(UNET) and model.tuning.is_base(name)]
    if own and "mixed" not in precision:
        raise InputError(
            f"--base_precision needs a frozen UNet, but this config trains {len(own)} of its tensors, e.g. "
            f"{own[0]}: leave it out, or add --precision bf16-mixed on a machine that has bf16"
        )


def base_model(run: Run, tuned: bool = True) -> pl.LightningModule:
    """The model of the config with the weights of its base checkpoint, in training mode, with or without its tuning."""
    torch.manual_seed(run.seed)  # adapters start from random numbers
    checkpoint = choose_checkpoint(run.config, run.base)
    return build_model(run.config, *checkpoint, tuned=tuned, read=reader(run.config)).train()
