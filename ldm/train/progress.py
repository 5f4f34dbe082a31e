"""The progress of a run, read from its folder: steps, loss, speed, time left."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from ldm.config import load_config
from ldm.errors import InputError

LOSS = "train/loss"


@dataclass(frozen=True)
class Logged:
    """One logged loss: the number of steps done, seconds since the epoch, the value."""

    step: int
    time: float
    value: float


@dataclass(frozen=True)
class Progress:
    """The progress of a run, as its folder shows it."""

    losses: list[Logged]  # by step; for a repeated step, the later one
    max_steps: int | None  # None: no limit is set

    @property
    def step(self) -> int:
        """The last step with a logged loss."""
        return self.losses[-1].step if self.losses else 0

    def means(self, steps: int) -> list[tuple[int, int, float, float]]:
        """The mean loss and its standard error over each part of `steps` steps; the latest part comes last.

        Each is (first step, last step, mean, error); parts with fewer than two logged losses are left out.
        """
        parts = []
        for end in (self.step - steps, self.step):
            values = [one.value for one in self.losses if end - steps < one.step <= end]
            if len(values) > 1:
                error = statistics.stdev(values) / len(values) ** 0.5
                parts.append((max(end - steps, 0), end, statistics.fmean(values), error))
        return parts

    def speed(self, points: int = 50) -> float | None:
        """Steps per second: the median over the latest logged losses, so pauses and restarts do not distort it."""
        latest = self.losses[-points:]
        pace = [(b.time - a.time) / (b.step - a.step) for a, b in zip(latest, latest[1:], strict=False)]
        return 1 / median if pace and (median := statistics.median(pace)) > 0 else None

    def seconds_left(self) -> float | None:
        """Seconds until `max_steps` at the current speed; None if either is unknown."""
        speed = self.speed()
        return None if speed is None or self.max_steps is None else max(0, self.max_steps - self.step) / speed


def read_progress(run: str | Path) -> Progress:
    """The progress of a run's folder. Raises `InputError` unless it is one."""
    run = Path(run)
    stored = run / "configs" / "project.yaml"
    if not stored.is_file():
        raise InputError(f"{run} is no folder of a run: expected {stored}")
    max_steps = OmegaConf.select(load_config(stored), "lightning.trainer.max_steps")
    return Progress(logged_losses(run / "tensorboard"), max_steps if max_steps and max_steps > 0 else None)


def logged_losses(folder: Path) -> list[Logged]:
    """The losses in TensorBoard's files by step. A resumed run has several files; the later one wins."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about files that are still being written
    by_step = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == LOSS:
                    # Lightning counts the logged step from 0.
                    by_step[event.step + 1] = Logged(event.step + 1, event.wall_time, value.tensor.float_val[0])
    return [by_step[step] for step in sorted(by_step)]


def newest_run(folder: str | Path) -> Path | None:
    """The latest run in a folder of runs; None if there is none."""
    runs = [path.parent.parent for path in Path(folder).glob("*/configs/project.yaml")]
    return max(runs, key=lambda run: run.name, default=None)  # names begin with the time
