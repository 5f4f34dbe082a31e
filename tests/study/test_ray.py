"""A sweep on Ray whose worker is killed: the same numbers as in one process."""

import os
import signal

import pytest

from ldm.study import engines
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
