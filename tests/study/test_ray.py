"""A sweep on Ray whose worker is killed: the same numbers as in one process."""

import os
import signal
from types import SimpleNamespace

import pytest

from ldm.study import engines
from ldm.study.worker import Task
from tests.study.conftest import sweep, table

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def test_a_killed_worker_is_replaced_and_the_numbers_are_those_of_one_process(work, words, monkeypatch):
    vary = ["route=attn2o-ffni,attn1i-attn2i", f"subject={work / 'a'}"]
    killed, usual = [], engines.OnRay.run

    def run(self, tasks, started, judge):
        def start_and_kill(task):
            started(task)
            if not killed:
                killed.append(ray.get(self.idle[-1].pid.remote()))
                os.kill(killed[0], signal.SIGKILL)

        return usual(self, tasks, start_and_kill, judge)

    monkeypatch.setattr(engines.OnRay, "run", run)
    assert sweep(*words, *vary, "--engine", "ray", "--workers", 1, "--out", work / "ray") == 0
    assert killed and not ray.is_initialized()
    assert sweep(*words, *vary, "--out", work / "local") == 0
    ours, theirs = table(work / "ray"), table(work / "local")
    assert len(ours) == 2 and ours.equals(theirs)


class Memoryless:
    """Ray as far as `OnRay.run` needs it; it kills the first `deaths` tasks because the machine is out of memory."""

    exceptions = ray.exceptions

    def __init__(self, deaths):
        self.deaths, self.killed = deaths, []

    def wait(self, references):
        return references[:1], references[1:]

    def get(self, reference):
        if reference == "pid":
            return 1
        if self.deaths:
            self.deaths -= 1
            raise ray.exceptions.OutOfMemoryError("the node is low on memory")
        return [{"status": "done", "task": reference}]

    def kill(self, worker):
        self.killed.append(worker)


@pytest.mark.parametrize("deaths,status", [(engines.ATTEMPTS - 1, "done"), (engines.ATTEMPTS, "failed")])
def test_a_worker_that_ray_kills_for_its_memory_is_replaced(deaths, status, monkeypatch):
    engine = object.__new__(engines.OnRay)
    engine.ray, engine.deaths = Memoryless(deaths), (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
    worker = SimpleNamespace(
        run=SimpleNamespace(remote=lambda task, judge: task.name), pid=SimpleNamespace(remote=lambda: "pid")
    )
    engine.idle, engine._new = [worker], lambda: worker
    monkeypatch.setattr(engines, "failed_row", lambda task, key, reason: {"status": "failed", "reason": reason})
    task = Task("first", "sweep", [{"key": "a"}], protocol=None)
    [(_, [row])] = engine.run([task], lambda task: None, None)
    assert row["status"] == status and len(engine.ray.killed) == deaths
    assert status == "done" or "low on memory" in row["reason"]
