"""One training run from its config to its last checkpoint. Entry points parse, call this, and report."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import pdb
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import LearningRateMonitor, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only

from ldm import schema
from ldm.checkpoints import read_object, save_text
from ldm.config import (
    check,
    check_entries,
    find_file,
    instantiate_from_config,
    load_config,
    merged,
    override,
    plain,
    stored_config,
)
from ldm.data.class_images import missing_class_images
from ldm.devices import best_device, cast_frozen
from ldm.errors import InputError, WriteError, explain
from ldm.files import read_text
from ldm.generate import Settings, fill_class_folder
from ldm.models.building import build_model, choose_checkpoint
from ldm.models.diffusion.draws import Stream
from ldm.train import caches, lock
from ldm.train.callbacks import EpochReport, ImageLogger
from ldm.train.datamodule import DataModuleFromConfig
from ldm.train.memory import keep_freed_memory
from ldm.train.optimizers import OptimizerModes, spell_out
from ldm.train.rates import AsConfigured
from ldm.train.resume import SafeCheckpointIO, SaveRun
from ldm.train.workers import Workers
from ldm.tuning import UNET
from ldm.writing import printable, why

log = logging.getLogger(__name__)

if rank_zero_only.rank:  # one of the processes speaks for all of them
    logging.getLogger("ldm").setLevel(logging.ERROR)
# Lightning's advice about itself. Batches here resume by their number, and draws are made where a picture is cached.
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
for message in (
    ".*dataloader is not resumable.*",
    ".*does not have many workers.*",
    ".*`isinstance\\(treespec.*",
    ".*in eval mode at the start of training.*",
):
    warnings.filterwarnings("ignore", message)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALVES = {"fp16": ("16", "16-mixed"), "bf16": ("bf16", "bf16-mixed")}


@dataclass
class Run:
    """What a run needs to know beside its config."""

    config: DictConfig
    folder: Path
    base: str | None = None  # checkpoint of the base model; None: the one that the config names
    resume: Path | None = None  # a last.ckpt to go on from
    seed: int = 23
    scale_lr: bool = False
    debug: bool = False
    base_precision: str = "fp32"  # of the UNet's frozen weights: fp32, bf16 or fp16
    cache: str = "off"  # where encodings of pictures and captions are kept: memory, off, or a folder
    keep_memory: bool = True  # on a CPU: what one step frees stays with the process for the next
    notes: dict[str, Any] = field(default_factory=dict)  # go into adapter folders: class word, identifier
    parts: Sequence[Run] = ()  # trainings side by side, with folders of their own

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


# --- configs and folders ------------------------------------------------------------------------------------------


def read_configs(paths: list[str], overrides: list[str], resumed: Path | None) -> DictConfig:
    """The config of a resumed run first, then those named on the command line, then overrides."""
    stored = [stored_config(resumed / "configs" / "project.yaml")] if resumed else []
    if not stored and not paths:
        raise InputError("no config: name one with --base, e.g. --base configs/sd-mini/attn2o-ffni.yaml")
    configs = [*stored, *(load_config(find_file(path)) for path in paths)]
    config = override(merged(*configs), overrides)
    spell_out(config)
    check_config(config)
    for section in ("model", "data"):
        if config.get(section) is None:
            raise InputError(f"the config has no {section!r} section; its keys are {list(config)}")
    for section in ("lightning", "lightning.trainer", "lightning.callbacks", "lightning.modelcheckpoint"):
        if OmegaConf.select(config, section) is None:
            OmegaConf.update(config, section, {})  # left out, or `callbacks:` with nothing below it
    return config


def check_config(config: DictConfig) -> None:
    """Refuse misspelt keys, wrong types and arguments that targets do not take; say what has no effect."""
    content = plain(config)
    check(content)
    check_entries(content)
    for dotted in schema.unused(content):
        log.info("%s has no effect", dotted)


def opened(options: argparse.Namespace, overrides: list[str]) -> tuple[DictConfig, Path | None, Path | None]:
    """The config that the options name, and the folder and checkpoint of the run that they go on with, if they do."""
    if options.resume and options.name:
        raise InputError("-r goes on with a run that has its name; leave -n out")
    folder, checkpoint = resumed_folder(options.resume) if options.resume else (None, None)
    return read_configs(options.base, overrides, folder), folder, checkpoint


def with_trainer(config: DictConfig, gpus: str | None, options: dict[str, Any]) -> DictConfig:
    """The config with Trainer options of the command line; devices there replace those that it names in another way."""
    if gpus is not None:
        options = options | {"gpus": gpus}
    elif {"accelerator", "devices"} & options.keys() and OmegaConf.select(config, "lightning.trainer.gpus") is not None:
        options = options | {"gpus": None}
    refuse_no_text(plain(config))
    return OmegaConf.merge(config, {"lightning": {"trainer": options}}) if options else config


def refuse_no_text(config: Any) -> None:
    """Raises `InputError` for values that are no text, such as names of files in another encoding than UTF-8.

    A run keeps its config as YAML, which has no place for them.
    """
    if isinstance(config, (Mapping, list, tuple)):
        for value in config.values() if isinstance(config, Mapping) else config:
            refuse_no_text(value)
    elif isinstance(config, str) and (shown := printable(config)) != config:
        raise InputError(
            f"{shown!r} is not UTF-8, so that the config of the run could not be kept: rename it, or name it by a link"
        )


def resumed_folder(path: str) -> tuple[Path, Path]:
    """The folder and the checkpoint of a run that is named by its folder or by a checkpoint in it."""
    given = Path(path)
    checkpoint = given if given.is_file() else given / "checkpoints" / "last.ckpt"
    folder = checkpoint.parent.parent
    if not checkpoint.is_file() or not (folder / "configs" / "project.yaml").is_file():
        raise InputError(
            f"cannot resume {path}: expected the folder of a run with checkpoints/last.ckpt and configs/project.yaml"
        )
    return folder, checkpoint


def new_folder(logdir: str, project: str, data: str, name: str, postfix: str) -> Path:
    """`<logdir>/<project>/<data><timestamp>_<name><postfix>`, with a number where another run of this second has it."""
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    names = (f"{data}{now}_{name}{postfix}" + (f"-{n}" if n else "") for n in itertools.count())
    return next(path for path in (Path(logdir) / project / name for name in names) if not path.exists())


@contextlib.contextmanager
def unless_refused(run: Run, saver: SaveRun) -> Iterator[None]:
    """Takes the folder of a new run away again where an error ends it before its first step.

    From here on SIGUSR1 ends no run.
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


@rank_zero_only
def claim_folder(run: Run) -> None:
    """Make the folder of a new run, or one with the next number where another run has made it in the meantime."""
    planned = run.folder
    with explain(f"the folder {planned} cannot be written to", OSError):
        for number in itertools.count():
            run.folder = planned.with_name(f"{planned.name}-{number}") if number else planned
            try:
                return run.folder.mkdir(parents=True)
            except FileExistsError:
                continue


class KeepConfigs(pl.Callback):
    """Writes the configs of a run when its training begins; what is refused before that has changed nothing."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_start(self, *_: Any) -> None:
        for run in [self.run, *self.run.parts]:
            write_configs(run)


@rank_zero_only
def write_configs(run: Run) -> None:
    """Keep what is needed to repeat or resume the run: its resolved config and its command."""
    with explain(f"the folder {run.folder} cannot be written to", OSError):
        for name in ("checkpoints", "configs", "images"):
            (run.folder / name).mkdir(parents=True, exist_ok=True)
        lines = [*commands(run.folder), OmegaConf.to_yaml(run.config, resolve=True)]
        save_text(run.folder / "configs" / "project.yaml", "\n".join(lines))


def commands(folder: Path) -> list[str]:
    """The comments that tell which commands a run came from: those that its config tells of already, and this one."""
    stored = folder / "configs" / "project.yaml"
    lines = read_text(stored).splitlines() if stored.is_file() else []
    header = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
    return [*header, "# " + shlex.join(sys.argv).replace("\n", " ")]


# --- parts --------------------------------------------------------------------------------------------------------


def learning_rate(run: Run, processes: int) -> float:
    """The config's base learning rate; with `scale_lr` times processes, batch size and accumulated batches."""
    base = run.config.model.get("base_learning_rate")
    if not isinstance(base, (int, float)) or isinstance(base, bool) or base <= 0:
        raise InputError(f"model.base_learning_rate must be a positive number, got {base!r}")
    if not run.scale_lr:
        return float(base)
    accumulated = trainer_options(run).get("accumulate_grad_batches") or 1
    batch = run.config.data.params.batch_size
    log.info("learning rate %g = %g x %d processes x batch %d x %d accumulated", base * processes * batch * accumulated,
             base, processes, batch, accumulated)  # fmt: skip
    return float(base) * processes * batch * accumulated


def trainer_options(run: Run, automatic: bool = True) -> dict[str, Any]:
    """The trainer section of the config in the words of today's Lightning."""
    options = plain(run.config.get("lightning", {}).get("trainer", {}))
    gpus = options.pop("gpus", None)
    if gpus is not None:
        options |= gpu_options(gpus)
    devices = options.get("devices")
    if isinstance(devices, str) and devices.strip("0123456789, -") == "" and devices != "auto":
        with explain(f"--devices {devices}: expected how many, or which, such as 2 or 0,3", ValueError):
            options["devices"] = [int(d) for d in devices.split(",") if d.strip()] if "," in devices else int(devices)
    for name, usual in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
        if not automatic and (options.get(name) or usual) != usual:
            log.warning("%s has no effect: this model steps its two optimizers itself", name)
            del options[name]
    if str(options.get("precision")).endswith("-true") and options["precision"] != "32-true":
        raise InputError(
            f"--precision {options['precision']} would round the noise schedule, too: use bf16-mixed or 16-mixed, "
            "with --base_precision for the frozen weights"
        )
    if not automatic and options.get("strategy", "auto") in ("auto", "ddp") and several_devices(options):
        options["strategy"] = "ddp_find_unused_parameters_true"  # each of its backward passes is of one half alone
    for kind, named in HALVES.items():
        if str(options.get("precision")) in named and not (uses_gpu(options) or computes_on_cpu(kind)):
            log.warning("precision %s needs a GPU or another CPU; training in 32 bits", options["precision"])
            options["precision"] = "32-true"
    return options


def computes_on_cpu(precision: str) -> bool:
    """Whether this CPU has arithmetic of that precision for training; emulation takes up to a hundred times longer."""
    return precision == "fp32" or (precision == "bf16" and has_bf16())


def has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def uses_gpu(options: Mapping[str, Any]) -> bool:
    return options.get("accelerator", "auto") in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def several_devices(options: Mapping[str, Any]) -> bool:
    """Whether Lightning will train on more than one device."""
    devices = options.get("devices", "auto")
    if devices in ("auto", -1):
        devices = torch.cuda.device_count() if uses_gpu(options) else 1
    return (devices if isinstance(devices, int) else len(devices)) > 1 or (options.get("num_nodes") or 1) > 1


def first_device(run: Run) -> torch.device:
    """The device of the run's first process, before Lightning chooses it."""
    options = trainer_options(run)
    devices = options.get("devices", "auto")
    if uses_gpu(options) and isinstance(devices, list):
        return torch.device("cuda", devices[0])
    return best_device({"cpu": "cpu", "mps": "mps"}.get(options.get("accelerator", "auto")))


def gpu_options(gpus: Any) -> dict[str, Any]:
    """`--gpus 0,3` as Lightning 2 says it. Raises `InputError` where there are no such GPUs."""
    text = str(gpus).strip()
    is_list = text.startswith(("[", "(")) or "," in text  # `[1]` and `1,` are the second one, `1` is how many
    try:
        numbers = [int(part) for part in text.strip("[]() ").split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise InputError(f"--gpus {gpus!r}: expected numbers of GPUs such as 0, or 0,3")
    count = torch.cuda.device_count()
    if not count:
        raise InputError(f"--gpus {gpus}: this machine has no CUDA GPU; leave --gpus out or say --accelerator cpu")
    chosen = numbers if is_list else [*range(numbers[0])] if numbers[0] >= 0 else [*range(count)]
    if not chosen or max(chosen) >= count:
        raise InputError(f"--gpus {gpus}: this machine has {count} GPUs, 0 to {count - 1}; '0,' is the first one")
    return {"accelerator": "gpu", "devices": chosen}


def make_loggers(run: Run) -> Any:
    """The config's logger (Weights & Biases, ...) or TensorBoard in the run's folder."""
    config = run.config.get("lightning", {}).get("logger")
    if config is None and printable(str(run.folder)) != str(run.folder):
        log.warning("TensorBoard takes no folder whose name is not UTF-8: losses go to %s/csv/metrics.csv", run.folder)
        return CSVLogger(save_dir=run.folder, name="csv", version="")
    if config is None:
        return TensorBoardLogger(save_dir=run.folder, name="tensorboard", version="")
    with explain("lightning.logger", ImportError, AttributeError):
        extra = {"save_dir": str(run.folder)} if "save_dir" not in (config.get("params") or {}) else {}
        return instantiate_from_config(config, **extra)


def make_callbacks(run: Run, saver: SaveRun) -> list[pl.Callback]:
    """The config's callbacks and those that every run has."""
    section = run.config.get("lightning", {})
    callbacks = [instantiate_from_config(config) for config in (section.get("callbacks") or {}).values() if config]
    for callback in callbacks:
        if isinstance(callback, ImageLogger):
            callback.folders = [one.folder / "images" for one in run.parts or [run]]
    often = 10 if torch.cuda.is_available() else 1  # to show the loss is to wait for the device
    progress = TQDMProgressBar(refresh_rate=often if sys.stderr.isatty() else 50)
    schedule = plain(OmegaConf.select(run.config, "model.params.scheduler_config"))
    own = [AsConfigured(schedule), OptimizerModes(), KeepConfigs(run), EpochReport(), LearningRateMonitor("step")]
    return [saver.done, *callbacks, *own, progress, saver]


def checkpoint_every(config: DictConfig) -> int:
    """The steps between checkpoints."""
    section = config.get("lightning", {}).get("modelcheckpoint") or {}
    given = (section.get("params") or {}).get("every_n_train_steps")
    return schema.CheckpointParams().every_n_train_steps if given is None else given


def make_trainer(run: Run, saver: SaveRun, automatic: bool = True) -> pl.Trainer:
    """Lightning's Trainer. Raises `InputError` for options that contradict each other or the machine."""
    options = {"num_sanity_val_steps": 0, "log_every_n_steps": 10} | trainer_options(run, automatic)
    try:
        return pl.Trainer(
            **options,
            use_distributed_sampler=False,
            logger=make_loggers(run),
            callbacks=make_callbacks(run, saver),
            plugins=[SafeCheckpointIO()],
            enable_model_summary=False,
        )
    except (pl.utilities.exceptions.MisconfigurationException, TypeError, ValueError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"Lightning's Trainer refuses its options: {' '.join(str(error).split())}") from None


# --- the run ------------------------------------------------------------------------------------------------------


def prepare_class_pictures(run: Run, model: Any, folder: Path, prompt: str, number: int) -> None:
    """Let the first process fill the class folder with the base model's own pictures; the others wait for it."""
    if rank_zero_only.rank == 0:
        settings = Settings(scale=run.config.dreambooth.class_scale)
        fill_class_folder(model.to(first_device(run)), folder, prompt, number, settings, run.seed)
        model.cpu()
    while missing_class_images(folder, number):
        time.sleep(2)


def train(run: Run, model: pl.LightningModule, test: bool = True) -> pl.Trainer:
    """Train `model` as the config says and, with `test`, go through its test set once; the trainer, when it is done.

    A training that was asked to stop leaves the test set for when it has gone on to its end.
    """
    data = instantiate_from_config(run.config.data)
    if run.resume is None:
        claim_folder(run)
    saver = SaveRun(run.checkpoints, checkpoint_every(run.config), run.notes)
    with unless_refused(run, saver):
        trainer = fit(run, model, data, saver)
    if trainer.is_global_zero and not trainer.should_stop:
        finish(run, model)
    if test and OmegaConf.select(run.config, "data.params.test") is not None and not trainer.should_stop:
        trainer.validate(model, data.test_dataloader())
    return trainer


def fit(
    run: Run, module: pl.LightningModule, data: DataModuleFromConfig, saver: SaveRun
) -> pl.Trainer:
    """Train `module` on `data`: one training or, with `run.parts`, several side by side."""
    trainer = make_trainer(run, saver, module.automatic_optimization)
    pl.seed_everything(run.seed + trainer.global_rank, verbose=False)  # other masks of dropout in every process
    if trainer.world_size > 1 and getattr(module, "streams", None) == ():
        module.streams = [Stream(run.seed)]  # noise is drawn together, see `ldm.models.diffusion.draws`
    trainings = getattr(module, "trainings", [module])
    for one, part in zip(trainings, run.parts or [run], strict=True):
        one.learning_rate = learning_rate(part, trainer.world_size)
    module.learning_rate = trainings[0].learning_rate
    if run.keep_memory and trainer.strategy.root_device.type == "cpu":
        keep_freed_memory()
    if run.base_precision != "fp32":
        if trainer.strategy.root_device.type == "cpu" and not computes_on_cpu(run.base_precision):
            log.warning("this CPU emulates %s slowly; --base_precision fp32 is faster", run.base_precision)
        for one in trainings:
            refuse_mixed(one, trainer.precision)
        cast_frozen(module.model.diffusion_model, PRECISIONS[run.base_precision])
    count = sum(p.numel() for p in module.parameters() if p.requires_grad)
    log.info("%s: %s weights learn, learning rate %g", run.folder, f"{count:,}", module.learning_rate)
    try:
        with lock.held(run.folder), contextlib.ExitStack() as stack:
            with before_the_first_step():
                stack.enter_context(caches.encoded(trainings, data, run.cache, trainer.strategy.root_device))
            stack.enter_context(Workers(saver.kept).watched(trainer))
            trainer.fit(module, data, ckpt_path=str(run.resume) if run.resume else None)
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
    return trainer


def finish(run: Run, module: pl.LightningModule) -> None:
    """Let the families say what came out at the end of a training, each in the folder of its run."""
    trainings = getattr(module, "trainings", [module])
    for one, part in zip(trainings, run.parts or [run], strict=True):
        for chosen in one.tuning.families if hasattr(one, "tuning") else ():
            if hasattr(chosen.family, "finish"):
                chosen.family.finish(one, part.folder)


def last_good(run: Run) -> str:
    """What is still intact after a failure."""
    last = run.checkpoints / "last.ckpt"
    return f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint had been written"


def finished(run: Run) -> str | None:
    """The line that says so, where a run that is to go on has reached its end already."""
    if run.resume is None:
        return None
    options, content = trainer_options(run), read_object(run.resume)
    step = content.get("global_step") if isinstance(content, dict) else None
    if not isinstance(step, int):
        return None  # `SafeCheckpointIO` says what is wrong with it
    steps, epochs = options.get("max_steps"), options.get("max_epochs")
    if isinstance(steps, int) and 0 <= steps <= step:
        return f"nothing to do: {run.folder} is at step {step} of {steps}; go on with a higher --max_steps"
    done = epochs_done(content)
    if isinstance(epochs, int) and 0 <= epochs <= done:
        return f"nothing to do: {run.folder} is at epoch {done} of {epochs}; go on with a higher --max_epochs"
    return None


def epochs_done(content: Mapping[str, Any]) -> int:
    """The whole epochs that a checkpoint has behind it. It was written before Lightning counted the one that ended."""
    try:
        loops = content["loops"]["fit_loop"]
        ended = loops["epoch_loop.batch_progress"]["is_last_batch"]
        return int(loops["epoch_progress"]["current"]["processed"]) + bool(ended)
    except (KeyError, TypeError, ValueError):
        return 0


def outcome(run: Run) -> str:
    """What a run has left, by what is there."""
    kinds = {
        "adapters": any(run.checkpoints.glob("*-adapters")),
        "checkpoints": (run.checkpoints / "last.ckpt").is_file(),
    }
    there = " and ".join(kind for kind, is_there in kinds.items() if is_there)
    images = run.folder / "images"
    parts = [f"{there} are in {run.checkpoints}"] if there else [f"nothing was saved in {run.folder}: no step was done"]
    parts += [f"sample pictures in {images}"] if images.is_dir() and any(images.iterdir()) else []
    return ", ".join(parts)


@contextlib.contextmanager
def before_the_first_step(saver: SaveRun | None = None) -> Iterator[None]:
    """Whoever is stopped within this context, and before the first step of `saver`, is told that nothing was learnt."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if (saver is None or saver.done.step is None) and not getattr(stop, "is_told", False):
            log.info("stopped before the first step: nothing was learnt, nothing is saved")
            stop.is_told = True
        raise


def refuse_mixed(model: pl.LightningModule, precision: str) -> None:
    """Raises `InputError` where weights of the UNet itself learn in fp32 beside others in half precision."""
    own = [name for name in model.tuning.parameters() if name.startswith(UNET) and model.tuning.is_base(name)]
    if own and "mixed" not in precision:
        raise InputError(
            f"--base_precision is for what is added to the UNet, but here {len(own)} tensors of its own learn, e.g. "
            f"{own[0]}: leave it out, or add --precision bf16-mixed on a machine that has bf16"
        )


def base_model(run: Run, tuned: bool = True) -> pl.LightningModule:
    """The model of the config on the checkpoint that it starts from, in training mode; with its tuning, or without."""
    torch.manual_seed(run.seed)  # adapters start at random numbers
    return build_model(run.config, *choose_checkpoint(run.config, run.base), tuned=tuned).train()
