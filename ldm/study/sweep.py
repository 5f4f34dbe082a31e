"""A sweep from its trials to its table: what is finished is decided by the results, not by what ran them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.checkpoints import save_text
from ldm.config import plain
from ldm.data.class_images import missing_class_images
from ldm.errors import InputError
from ldm.evaluate.protocol import Protocol
from ldm.models.building import untuned_model
from ldm.study import asha, engines, plan, scoring
from ldm.study.engines import Engine
from ldm.study.keys import digest
from ldm.study.live import Progress
from ldm.study.plan import Asked, Trial
from ldm.study.results import FINISHED, Results
from ldm.train import dreambooth, lock
from ldm.writing import writing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class How:
    """How a sweep is run, which changes no number but for rounding."""

    together: int = 8  # trials that are trained at once over one base
    retry: bool = False  # failed trials, too
    any_code: bool = False  # results of another version of the code count
    keep: Sequence[str] = ("pictures",)
    asha: tuple[int | None, int] | None = None  # (first rung, factor); then trials are trained one by one
    metric: str = "clip_i"


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Within this context no other process sweeps in the folder. Raises `InputError` if another one does."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with lock.held(out):
        yield


def run(sweep: Asked, how: How, make_engine: Callable[[], Engine], command: str = "") -> tuple[Path, dict[str, int]]:
    """Run what is missing of a sweep; its table, and how many of its trials have which status. Raises `InputError`."""
    trials = plan.trials_of(sweep)
    protocol = scoring.protocol_for(trials[0].run, sweep.evaluate)
    with held(sweep.out):
        results = Results(sweep.out)
        engine: Engine | None = None
        try:
            if lacking := class_pictures(trials):
                engine = make_engine()
                fill(lacking, engine)
            plan.give_keys(trials, protocol)
            missing = [trial for trial in trials if wanted(trial, results, how)]
            log.info("%d trials, %d of them are to be run", len(trials), len(missing))
            _keep_command(sweep.out, command)
            if missing:
                engine = engine or make_engine()
                _run_missing(sweep, protocol, how, missing, len(trials), results, engine)
        finally:
            if engine is not None:
                engine.close()
        own = [results.status(trial.key, trial.recipe if how.any_code else None) for trial in trials]
        return results.table(), {status: own.count(status) for status in sorted({*own})}


def _run_missing(
    sweep: Asked, protocol: Protocol, how: How, missing: list[Trial], total: int, results: Results, engine: Engine
) -> None:
    judge, rungs = None, ()
    if how.asha:
        (steps, *others) = sorted({trial.run.config.lightning.trainer.max_steps for trial in missing})
        if others:
            raise InputError("--scheduler asha compares trials of one length; these have several")
        first, factor = how.asha[0] or max(1, steps // 4), how.asha[1]
        rungs = asha.rungs(first, steps, factor)
        known = [row for rows in results.rows.values() for row in rows]
        judge = asha.Judge(how.metric, first, steps, factor, known)
    groups = plan.groups_of(missing, 1 if how.asha else how.together)
    tasks = [plan.task_of(group, sweep, protocol, how.keep, rungs) for group in groups]
    with Progress(total, total - len(missing), len(missing), engine.slots) as progress:
        for task, rows in engine.run(tasks, progress.started, judge):
            results.add(task.name, rows)
            results.table()
            progress.ended(task, rows)


def wanted(trial: Trial, results: Results, how: How) -> bool:
    """Whether a trial is to be run: it has no results, or it failed and is to be tried again."""
    status = results.status(trial.key, trial.recipe if how.any_code else None)
    return status is None or status not in FINISHED and how.retry


def _keep_command(out: Path, command: str) -> None:
    """Add the command to those that made the folder."""
    path = out / "commands.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if command and command not in lines:
        save_text(path, "\n".join([*lines, command]) + "\n")


def class_pictures(trials: Sequence[Trial]) -> list[tuple[Trial, Path, str, int]]:
    """The folders of class pictures that are to be filled, once each."""
    found: dict[Path, tuple[Trial, str, int]] = {}
    for trial in trials:
        number = trial.class_pictures
        for folder, caption in dreambooth.class_folders(trial.run.config) if number else ():
            if missing_class_images(folder, number):
                found.setdefault(folder, (trial, caption, number))
    return [(trial, folder, caption, number) for folder, (trial, caption, number) in found.items()]


def fill(lacking: Sequence[tuple[Trial, Path, str, int]], engine: Engine) -> None:
    for trial, folder, caption, number in lacking:
        log.info("%s: class pictures, %s", folder, caption)
        engine.call("fill_class_pictures", plain(trial.run.config), str(folder), caption, number)


# --- before it runs -----------------------------------------------------------------------------------------------


def parameters(trial: Trial) -> int:
    """How many weights learn."""
    with torch.device("meta"):
        model = untuned_model(trial.run.config)
        for chosen in model.tuning.families:
            chosen.family.install(model)
        learning = [chosen.family.trainable(model) for chosen in model.tuning.families if chosen.learns]
    return sum(p.numel() for p in {name: p for own in learning for name, p in own.items()}.values())


def forecast(sweep: Asked, how: How, threads: int, workers: int) -> dict[str, Any]:
    """The trials, what learns in each, and the time and memory of all by a few measured steps of the first group.

    Nothing is written. Where class pictures are still missing, the subject's stand in for them.
    """
    trials = plan.trials_of(sweep)
    counts: dict[str, int] = {}
    learning = []
    for trial in trials:
        alike = digest(plain(trial.run.config)["model"])
        if alike not in counts:
            counts[alike] = parameters(trial)
        learning.append(counts[alike])
    groups = plan.groups_of(trials, 1 if how.asha else how.together)
    first = groups[0]
    for trial in first:
        trial.key = str(trial.number)
        settings = trial.run.config
        if settings.data.params.get("reg") is not None and class_pictures([trial]):
            settings.data.params.reg.params.data_root = settings.dreambooth.data_root
        settings.dreambooth.cache = "memory"
    cost = engines.Local(threads).call("measure", _bare_task(first, sweep))
    each = [group[0].run.config.lightning.trainer.max_steps * cost["step"] * len(group) / len(first)
            + len(group) * cost["score"] for group in groups]  # fmt: skip
    return {
        "trials": [(trial.settings, count) for trial, count in zip(trials, learning, strict=True)],
        "groups": len(groups), "together": len(first), "workers": workers,
        "seconds": sum(each) / workers, "seconds_per_trial": sum(each) / len(trials) / workers,
        "step": cost["step"], "score": cost["score"], "memory": cost["memory"],
    }  # fmt: skip


def _bare_task(group: Sequence[Trial], sweep: Asked) -> Any:
    trials = [{"key": trial.key, "config": plain(trial.run.config), "about": {}} for trial in group]
    return plan.Task("measured", str(sweep.out), trials, scoring.protocol_for(group[0].run, sweep.evaluate))
