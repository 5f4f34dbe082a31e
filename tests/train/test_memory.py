"""Memory that a step on a CPU frees stays with the process: the kernel clears no page twice."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ldm.train import memory, run
from tests.runs import train

pytestmark = pytest.mark.slow

COUNT = """
import json, resource, torch
from ldm.train.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    first = torch.empty(5 * 2**18).fill_(1)  # 5 MiB
    for _ in range(8):
        second = torch.empty(5 * 2**18).fill_(1)
        del first, second
        first = torch.empty(5 * 2**18).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(5):
    without = faults()
kept = keep_freed_memory()
for _ in range(5):
    with_it = faults()
print(json.dumps([without, kept, with_it]))
"""


@pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_kept_memory_is_not_faulted_in_again():
    # By itself glibc raises its threshold as blocks are freed, and what lies at the end of its heap decides the rest.
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    printed = subprocess.run(
        [sys.executable, "-c", COUNT], capture_output=True, text=True, check=True, env=fixed
    ).stdout
    without, kept, faults = json.loads(printed)
    assert kept
    assert without > 100, "the test sees nothing: this machine kept the memory anyway"
    assert faults < without / 10


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("called"))
    assert not memory.keep_freed_memory()


@pytest.mark.parametrize("told, calls", [([], 1), (["--keep_memory", "false"], 0), (["--keep_memory", "true"], 1)])
def test_a_run_on_a_cpu_keeps_memory_unless_told_otherwise(told, calls, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(run, "keep_freed_memory", lambda: called.append(torch.get_num_threads()))
    folder = train(tmp_path, "run", "--max_steps", 1, *told)
    assert len(called) == calls
    assert f"keep_memory: {'true' if calls else 'false'}" in (folder / "configs" / "project.yaml").read_text()
