"""How many threads a CPU gets."""

import os

import pytest
import torch

from ldm import devices

CASES = {
    "no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
    "version 2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
    "version 2, of a group around it": (
        {
            "proc/self/cgroup": "0::/pod/job\n",
            "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/pod/job/cpu.max": "max 100000\n",
        },
        2,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "4:memory:/pod\n3:cpu,cpuacct:/pod\n",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000\n",
        },
        4,
    ),
    "version 1 without a limit": (
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        64,
    ),
    "a system without control groups": ({}, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_the_quota_of_a_container_counts(tmp_path, monkeypatch, case):
    files, expected = CASES[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert devices.usable_cpus(tmp_path) == expected


def test_threads_are_as_many_as_cpus_unless_the_user_says_otherwise(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(devices, "usable_cpus", lambda: 6)
    devices.limit_threads()
    assert chosen == []  # the tests set OMP_NUM_THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    devices.limit_threads(), devices.limit_threads(processes=4), devices.best_device("cpu")
    assert chosen == [6, 1, 6]
