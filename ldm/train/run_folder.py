"""A run and its folder: how the folder is named, created and filled, and what it shows about the run."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

from ldm.checkpoints import read_object, save_text
from ldm.errors import InputError, explain
from ldm.files import read_text
from ldm.train.trainer_section import trainer_options


@dataclass
class Run:
    """A config with everything else that a run needs."""

    config: DictConfig
    folder: Path
    base: str | None = None  # checkpoint of the base model; None: the one that the config names
    resume: Path | None = None  # a last.ckpt to go on from
    seed: int = 23
    scale_lr: bool = False
    debug: bool = False
    base_precision: str = "fp32"  # of the UNet's frozen weights: fp32, bf16 or fp16
    cache: str = "off"  # where encodings of pictures and captions are kept: memory, off, or a folder
    keep_memory: bool = True  # on a CPU: the process keeps freed memory for the next step
    notes: dict[str, Any] = field(default_factory=dict)  # go into adapter folders: class word, identifier
    parts: Sequence[Run] = ()  # trainings side by side, with folders of their own

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


def resumed_folder(path: str) -> tuple[Path, Path]:
    """The folder and the checkpoint of a run; `path` is the folder, or a checkpoint in it."""
    given = Path(path)
    checkpoint = given if given.is_file() else given / "checkpoints" / "last.ckpt"
    folder = checkpoint.parent.parent
    if not checkpoint.is_file() or not (folder / "configs" / "project.yaml").is_file():
        raise InputError(
            f"cannot resume {path}: expected the folder of a run with checkpoints/last.ckpt and configs/project.yaml"
        )
    return folder, checkpoint


def new_folder(logdir: str, project: str, data: str, name: str, postfix: str) -> Path:
    """`<logdir>/<project>/<data><timestamp>_<name><postfix>`; if that folder exists, with a number at the end."""
    now = datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    names = (f"{data}{now}_{name}{postfix}" + (f"-{n}" if n else "") for n in itertools.count())
    return next(path for path in (Path(logdir) / project / name for name in names) if not path.exists())


@rank_zero_only
def claim_folder(run: Run) -> None:
    """Create the folder of a new run. If another run has created it in the meantime, add a number to the name."""
    planned = run.folder
    with explain(f"the folder {planned} cannot be written to", OSError):
        for number in itertools.count():
            run.folder = planned.with_name(f"{planned.name}-{number}") if number else planned
            try:
                return run.folder.mkdir(parents=True)
            except FileExistsError:
                continue


class KeepConfigs(pl.Callback):
    """Writes the configs of a run when its training begins. A run that is refused earlier leaves no files."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_start(self, *_: Any) -> None:
        for run in [self.run, *self.run.parts]:
            write_configs(run)


@rank_zero_only
def write_configs(run: Run) -> None:
    """Store the resolved config and the command of a run, which are needed to repeat or resume it."""
    with explain(f"the folder {run.folder} cannot be written to", OSError):
        for name in ("checkpoints", "configs", "images"):
            (run.folder / name).mkdir(parents=True, exist_ok=True)
        lines = [*commands(run.folder), OmegaConf.to_yaml(run.config, resolve=True)]
        save_text(run.folder / "configs" / "project.yaml", "\n".join(lines))


def commands(folder: Path) -> list[str]:
    """The comments with the commands of a run: those in its stored config, and the current one."""
    stored = folder / "configs" / "project.yaml"
    lines = read_text(stored).splitlines() if stored.is_file() else []
    header = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
    return [*header, "# " + shlex.join(sys.argv).replace("\n", " ")]


def last_good(run: Run) -> str:
    """A phrase that names the last good checkpoint after a failure."""
    last = run.checkpoints / "last.ckpt"
    return f"the last good checkpoint is {last}" if last.is_file() else "no checkpoint had been written"


def finished(run: Run) -> str | None:
    """A line that says that a resumed run has already reached its end; None if it has not."""
    if run.resume is None:
        return None
    options, content = trainer_options(run.config), read_object(run.resume)
    step = content.get("global_step") if isinstance(content, dict) else None
    if not isinstance(step, int):
        return None  # `SafeCheckpointIO` will report the fault
    steps, epochs = options.get("max_steps"), options.get("max_epochs")
    if isinstance(steps, int) and 0 <= steps <= step:
        return f"already at step {step} of {steps}, nothing to do in {run.folder}; go on with a higher --max_steps"
    done = epochs_done(content)
    if isinstance(epochs, int) and 0 <= epochs <= done:
        return f"already at epoch {done} of {epochs}, nothing to do in {run.folder}; go on with a higher --max_epochs"
    return None


def epochs_done(content: Mapping[str, Any]) -> int:
    """The number of finished epochs of a checkpoint, which is written before Lightning counts the last one."""
    try:
        loops = content["loops"]["fit_loop"]
        ended = loops["epoch_loop.batch_progress"]["is_last_batch"]
        return int(loops["epoch_progress"]["current"]["processed"]) + bool(ended)
    except (KeyError, TypeError, ValueError):
        return 0


def step_folders(checkpoints: Path) -> list[Path]:
    """The folders `<step>-adapters`, in the order of their steps."""
    found = [path for path in checkpoints.glob("*-adapters") if path.name.partition("-")[0].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[0]))


def outcome(run: Run) -> str:
    """A line that says what a run has written."""
    kinds = {
        "adapters": any(run.checkpoints.glob("*-adapters")),
        "checkpoints": (run.checkpoints / "last.ckpt").is_file(),
    }
    there = " and ".join(kind for kind, is_there in kinds.items() if is_there)
    images = run.folder / "images"
    best = [run.checkpoints / name for name in ("best-adapters", "best.ckpt") if (run.checkpoints / name).exists()]
    parts = [f"{there} are in {run.checkpoints}"] if there else [f"nothing was saved in {run.folder}: no step was done"]
    parts += [f"the best of them are {path}" for path in best[:1]]
    parts += [f"sample pictures in {images}"] if images.is_dir() and any(images.iterdir()) else []
    return ", ".join(parts)
