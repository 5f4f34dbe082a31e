"""What runs the tasks of a sweep: this process, or Ray on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from ldm.config import PACKAGE
from ldm.errors import InputError, first_line
from ldm.study.asha import Judge
from ldm.study.worker import Task, Worker, failed_row

log = logging.getLogger(__name__)

ATTEMPTS = 3  # of a group whose worker dies
Row = dict[str, Any]
Outcome = tuple[Task, list[Row]]


class Engine(Protocol):
    """Runs tasks, several at a time."""

    slots: int  # workers

    def run(self, tasks: Sequence[Task], started: Callable[[Task], None], judge: Judge | None) -> Iterator[Outcome]:
        """The rows of each task, in the order in which they end."""

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of one worker, to its end."""

    def close(self) -> None:
        """Let the workers go."""


class Local:
    """One worker, in this process."""

    slots = 1

    def __init__(self, threads: int) -> None:
        self.worker = Worker(threads)

    def run(self, tasks: Sequence[Task], started: Callable[[Task], None], judge: Judge | None) -> Iterator[Outcome]:
        for task in tasks:
            started(task)
            with quiet():
                rows = self.worker.run(task, judge and judge.goes_on)
            yield task, rows

    def call(self, method: str, *arguments: Any) -> Any:
        with quiet():
            return getattr(self.worker, method)(*arguments)

    def close(self) -> None:
        del self.worker


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context single trainings say nothing but what is wrong."""
    loggers = {logging.getLogger(f"ldm.{room}"): logging.WARNING for room in ("train", "data", "models", "generate")}
    before = {logger: logger.level for logger in loggers}
    for logger, level in loggers.items():
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


class OnRay:
    """Workers that are actors of Ray, each with its cores and its share of a GPU.

    `address` is that of a cluster that is there; without one Ray is started on this machine, and ends with this
    process. A worker that dies is replaced, and its task begins again.
    """

    def __init__(self, workers: int, threads: int, gpus: float, address: str | None = None) -> None:
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by Ray itself: whatever else runs would come first
        try:
            import ray
        except ImportError as error:
            raise InputError(
                f"--engine ray needs {error.name}: pip install '.[sweep]', or train in this process by --engine local"
            ) from None
        self.ray, self.slots = ray, workers
        # Ray tells a worker that it killed for want of memory from one that died otherwise.
        self.deaths = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
        own = {} if address else {
            "num_cpus": workers * threads, "include_dashboard": False, "object_store_memory": 100 * 2**20,
        }  # fmt: skip
        paths = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
        variables = {"PYTHONPATH": paths, "TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(threads)}
        self.is_own = not ray.is_initialized()
        if self.is_own:
            try:
                ray.init(
                    address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False,
                    runtime_env={"env_vars": variables}, **own,
                )  # fmt: skip
            except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
                raise InputError(f"Ray cannot be reached or started: {first_line(error)}") from None
        self.actor = ray.remote(num_cpus=threads, num_gpus=gpus, max_restarts=0)(Worker)
        self.threads = threads
        self.idle: list[Any] = [self._new() for _ in range(workers)]

    def _new(self) -> Any:
        return self.actor.remote(self.threads)

    def _replacement(self) -> Any:
        """A worker in place of one that died. Raises `InputError` where none can start: that is no trial's fault."""
        worker = self._new()
        try:
            self.ray.get(worker.pid.remote())
        except self.deaths as error:
            reason = (str(error).strip().splitlines() or ["no reason"])[-1]
            raise InputError(f"no worker can start, so the sweep ends; the same command goes on: {reason}") from None
        return worker

    def run(self, tasks: Sequence[Task], started: Callable[[Task], None], judge: Judge | None) -> Iterator[Outcome]:
        ray = self.ray
        asked = _judge_of_workers(ray, judge) if judge else None
        waiting, running = list(tasks), {}
        while waiting or running:
            while waiting and self.idle:
                task, worker = waiting.pop(0), self.idle[-1]
                started(task)
                self.idle.pop()
                running[worker.run.remote(task, asked)] = task, worker
            (ready, *_), _ = ray.wait(list(running))
            task, worker = running.pop(ready)
            try:
                rows = ray.get(ready)
                self.idle.append(worker)
            except self.deaths as error:
                ray.kill(worker)
                self.idle.append(self._replacement())
                task.attempts += 1
                log.warning("a worker died in %s: %s", task.name, first_line(error))
                if task.attempts < ATTEMPTS:
                    waiting.insert(0, task)
                    continue
                reason = f"its worker died {ATTEMPTS} times: {first_line(error)}"
                rows = [failed_row(task, trial["key"], reason) for trial in task.trials]
            yield task, rows

    def call(self, method: str, *arguments: Any) -> Any:
        try:
            return self.ray.get(getattr(self.idle[-1], method).remote(*arguments))
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise

    def close(self) -> None:
        for worker in self.idle:
            self.ray.kill(worker)
        if self.is_own:
            self.ray.shutdown()


class _AskJudge:
    """A judge in a process of its own, as workers call it."""

    def __init__(self, ray_get: Any, actor: Any) -> None:
        self.get, self.actor = ray_get, actor

    def __call__(self, key: str, step: int, scores: Any) -> bool:
        return self.get(self.actor.goes_on.remote(key, step, dict(scores)))


def _judge_of_workers(ray: Any, judge: Judge) -> _AskJudge:
    class Held:
        def __init__(self, judge: Judge) -> None:
            self.judge = judge

        def goes_on(self, key: str, step: int, scores: Any) -> bool:
            return self.judge.goes_on(key, step, scores)

    return _AskJudge(ray.get, ray.remote(num_cpus=0)(Held).remote(judge))
