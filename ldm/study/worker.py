"""What trains and scores trials: one process that keeps its base model and its scorer from group to group."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ldm.config import plain
from ldm.errors import InputError, first_line
from ldm.evaluate.protocol import Protocol
from ldm.study import scoring
from ldm.study.keys import commit, versions
from ldm.train import dreambooth, many, run_folder
from ldm.train import run as runs
from ldm.train.callbacks import EpochReport, peak_memory
from ldm.train.run_folder import Run, step_folders
from ldm.train.trainer_section import first_device
from ldm.tuning import files, table

log = logging.getLogger(__name__)

Row = dict[str, Any]
Judge = Callable[[str, int, Mapping[str, float]], bool]  # (trial's key, step, its scores): whether it goes on


# What may be wrong with a trial, its pictures, or the memory that it takes; anything else ends the sweep.
FAILURES = (InputError, RuntimeError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, OSError)


@dataclass
class Task:
    """Trials that are trained together, each `{key, config, about}`: its complete config, and columns of its rows."""

    name: str
    folder: str  # of the sweep
    trials: list[dict[str, Any]]
    protocol: Protocol
    keep: Sequence[str] = ()  # of "adapters", "pictures"
    rungs: Sequence[int] = ()  # steps after which a judge is asked, for a trial that is alone
    attempts: int = field(default=0, compare=False)

    @property
    def runs_folder(self) -> Path:
        return Path(self.folder) / "runs" / self.name


class Worker:
    """Trains groups of trials and scores them."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.threads = threads
        self.base: tuple[str, Any] | None = None  # what it was made of, the model
        self.scorer = scoring.Scorer()

    def pid(self) -> int:
        """The number of this process."""
        return os.getpid()

    # --- a group

    def run(self, task: Task, judge: Judge | None = None) -> list[Row]:
        """Train the trials of a group and score them; the rows of all, also of those that failed."""
        parts = {trial["key"]: self._run_of(task, trial) for trial in task.trials}
        together, alone = self._shared(parts)
        rows: dict[str, list[Row]] = {}
        if together:
            try:
                trained = self._train_together(task, together)
            except FAILURES as error:  # of one of them, perhaps: alone each says for itself
                log.warning("%s: %s; its trials are trained one by one", task.name, first_line(error))
                alone = [key for key in parts if key in together or key in alone]
            else:
                for key, part in together.items():
                    rows[key] = self._tried(task, key, len(together), lambda key=key, part=part: self._score(
                        task, key, part, many.tuned_view(self._base(part), part), trained / len(together)))  # fmt: skip
        for key in alone:
            rows[key] = self._tried(task, key, 1, lambda key=key: self._alone(task, key, parts[key], judge))
        if "adapters" not in task.keep:
            shutil.rmtree(task.runs_folder, ignore_errors=True)
        else:
            self._tidy(task.runs_folder)
        return [row for key in parts for row in rows[key]]

    def _run_of(self, task: Task, trial: Mapping[str, Any]) -> Run:
        return dreambooth.as_run(OmegaConf.create(trial["config"]), task.runs_folder / trial["key"])

    def _tried(self, task: Task, key: str, together: int, work: Callable[[], list[Row]]) -> list[Row]:
        """The rows that `work` gives, or one that says why there are none."""
        try:
            rows = work()
        except FAILURES as error:
            reason = f"{'' if isinstance(error, InputError) else type(error).__name__ + ': '}{first_line(error)}"
            rows = [failed_row(task, key, reason)]
        about = {"group": task.name, "together": together, "threads": self.threads, **provenance()}
        return [{**row, **about} for row in rows]

    def _shared(self, parts: Mapping[str, Run]) -> tuple[dict[str, Run], list[str]]:
        """The trainings that can share a base, and the keys of those that must have their own."""
        if len(parts) == 1:
            return {}, list(parts)
        shared = {}
        for key, part in parts.items():
            try:
                many.tuned_view(self._base(part), part)
            except Exception as error:  # it is tried alone, where its reason is recorded
                log.info("%s is trained alone: %s", key, first_line(error))
            else:
                shared[key] = part
        shared = shared if len(shared) > 1 else {}
        return shared, [key for key in parts if key not in shared]

    def _base(self, run: Run) -> Any:
        """The base model of a run without tuning: that of the last group, if it is the same."""
        made_of = base_name(run)
        if self.base is None or self.base[0] != made_of:
            self.base = None  # before the next one is read
            self.base = made_of, runs.base_model(run, tuned=False)
        return self.base[1]

    def _train_together(self, task: Task, parts: Mapping[str, Run]) -> float:
        """Train; the seconds that it took. A training that was interrupted goes on where it stopped."""
        trainings, folder = list(parts.values()), task.runs_folder
        last = folder / "checkpoints" / "last.ckpt"
        if not last.is_file():
            shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        if many.finished(trainings, folder) is None:
            many.train(trainings, folder, base=self._base(trainings[0]))
            if trainings[0].base_precision != "fp32":
                self.base = None  # its weights were cast
        return time.perf_counter() - start

    def _alone(self, task: Task, key: str, run: Run, judge: Judge | None) -> list[Row]:
        """Train and score one trial; with a judge, rung by rung until it says that it is enough."""
        steps = run.config.lightning.trainer.max_steps
        rungs = sorted({rung for rung in task.rungs if rung < steps} | {steps}) if judge else [steps]
        seconds, rows = 0.0, []
        for rung in rungs:
            run.config.lightning.trainer.max_steps = rung
            seconds += self._train_alone(run)
            rows = self._score(task, key, run, runs.base_model(run), seconds)
            if judge and rung < steps and not judge(key, rung, rows[-1]):
                rows[-1]["status"] = "stopped"
                break
        return rows

    def _train_alone(self, run: Run) -> float:
        last = run.checkpoints / "last.ckpt"
        run.resume = last if last.is_file() else None
        if run.resume is None:
            shutil.rmtree(run.folder, ignore_errors=True)
        start = time.perf_counter()
        if run_folder.finished(run) is None:
            dreambooth.train(run, argparse.Namespace(num_class_images=0, no_test=True))
        return time.perf_counter() - start

    # --- scores

    def _score(self, task: Task, key: str, run: Run, model: Any, trained: float) -> list[Row]:
        """A row for each checkpoint of a training, which is read from its folder into `model`."""
        rows: list[Row] = []
        folders = {int(path.name.split("-")[0]): path for path in step_folders(run.checkpoints)}
        if not folders:
            raise InputError(f"{run.checkpoints} holds nothing that was learnt")
        device = first_device(run.config)
        about = next(trial["about"] for trial in task.trials if trial["key"] == key)
        count = sum(p.numel() for p in model.trainable_parameters().values())
        for step, folder in sorted(folders.items()):
            start = time.perf_counter()
            files.load(model, folder)
            model.to(device).eval()
            base = (base_name(run), lambda: self._base(run).to(device))
            scores, untuned = self.scorer.scores(model, run, task.protocol, *base), None
            if "pictures" in task.keep:
                kept = Path(task.folder) / "pictures"
                scoring.save(scores.drawn, kept / key / f"{step:06}")
                untuned = self.scorer.keep_base(run, task.protocol, *base, kept / "base")
            scored = time.perf_counter() - start
            rows.append({
                **about,
                "key": key, "step": step, "status": "done", "reason": None,
                **scores.row(),
                "seconds": trained * step / max(folders) + scored, "seconds_training": trained * step / max(folders),
                "seconds_scoring": scored, "peak_memory": int(peak_memory(device) * 2**30), "device": device.type,
                "parameters": count,
                "family": "+".join(table.name_of(chosen.target) for chosen in model.tuning.families),
                "each": scores.pictures, "networks": scores.networks, "base_pictures": untuned,
            })  # fmt: skip
        return rows

    @staticmethod
    def _tidy(folder: Path) -> None:
        """Leave the folders of adapters and the configs, and nothing that only a resume needs."""
        for path in sorted(folder.rglob("*"), reverse=True):
            kept = any(part.endswith("-adapters") or part == "configs" for part in path.relative_to(folder).parts)
            if path.is_file() and not kept:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    # --- before a sweep

    def fill_class_pictures(self, config: Mapping[str, Any], folder: str, caption: str, number: int) -> None:
        """Fill a folder of class pictures up to a number by the base model."""
        run = dreambooth.as_run(OmegaConf.create(config), Path(folder))
        runs.prepare_class_pictures(run, self._base(run), Path(folder), caption, number)

    def measure(self, task: Task, steps: int = 3) -> dict[str, float]:
        """Seconds of a training step of a group and of the scores of a trial, and the bytes that both take."""
        with tempfile.TemporaryDirectory() as work:
            parts = []
            for trial in task.trials:
                config = OmegaConf.create(trial["config"])
                config.lightning.trainer.max_steps = steps
                parts.append(dreambooth.as_run(config, Path(work) / "group" / trial["key"]))
            if len(parts) > 1 and self._shared({part.folder.name: part for part in parts})[0]:
                trainer = many.train(parts, Path(work) / "group", base=self._base(parts[0]))
                count = 1
            else:
                count, parts = len(parts), parts[:1]
                trainer = dreambooth.train(parts[0], argparse.Namespace(num_class_images=0, no_test=True))
            (report,) = (one for one in trainer.callbacks if isinstance(one, EpochReport))
            model = runs.base_model(parts[0]).to(first_device(parts[0].config)).eval()
            start, run = time.perf_counter(), parts[0]
            self.scorer.scores(model, run, task.protocol, base_name(run), lambda: self._base(run))
            memory = peak_memory(first_device(parts[0].config)) * 2**30
            return {
                "step": count * report.seconds / report.steps,
                "score": time.perf_counter() - start,
                "memory": memory,
            }


def base_name(run: Run) -> str:
    """What tells base models apart: the model without its tuning, its weights, their precision."""
    made_of = [many.without(run.config)["model"], plain(run.config.get("checkpoint")), run.base, run.base_precision]
    return json.dumps(made_of, sort_keys=True)


def failed_row(task: Task, key: str, reason: str) -> Row:
    """The row of a trial without results."""
    about = next(trial["about"] for trial in task.trials if trial["key"] == key)
    return {**about, "key": key, "step": None, "status": "failed", "reason": reason}


def provenance() -> Row:
    """When, where and by what a row was made."""
    return {
        "finished": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "worker": f"{socket.gethostname()}:{os.getpid()}",
        "commit": commit(),
        "versions": versions(),
    }
