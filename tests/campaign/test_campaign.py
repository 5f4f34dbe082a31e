"""A few attacks of every family, with a fixed seed; `make campaign` makes all of them."""

import signal

import pytest

from tests.campaign.attacks import REFUSED, SURVIVED, Failed, judged
from tests.campaign.forked import Outcome
from tests.runs import command

pytestmark = pytest.mark.slow

# Kills, full disks, signals and concurrent runs start programs by the dozen: `make campaign` is for them, and
# tests/train and tests/commands/files try each of them once.
FAMILIES = ("configs", "adapters", "runs")  # hostile files: tests/test_hostile_files.py reads all of them


def test_a_few_attacks_do_no_harm():
    done = command("-m", "tests.campaign", "--few", "--jobs", "1", "--only", *FAMILIES)
    assert done.returncode == 0, done.stdout + done.stderr


def test_harm_is_told():
    """The campaign itself can fail."""
    for outcome, message in (
        (Outcome(1, "Traceback (most recent call last):\nKeyError: 'a'\n", 1, 0), "a traceback, exit code 1: KeyError"),
        (Outcome(-signal.SIGSEGV, "", 1, 0), "exit code -11"),
        (Outcome(2, "usage\n", 1, 0), "not one that says what was wrong"),
        (Outcome(-signal.SIGKILL, "reading", 9, 0, hung=True), "hung: killed after 9 s"),
        (Outcome(1, "wrong: a mixture", 1, 0), "a mixture"),
    ):
        with pytest.raises(Failed, match=message):
            judged(outcome)
    assert judged(Outcome(2, "reading\nerror: no such file\n", 1, 0)) == REFUSED
    assert judged(Outcome(0, "done\n", 1, 0)) == SURVIVED


SCRIPT = """
import os, sys
from pathlib import Path
from tests.campaign.forked import forked
from tests.campaign.kills import changes, killed_at

folder = Path(sys.argv[1])

def write():
    (folder / "a").write_text("new and long")
    with open(folder / "b", "w") as file:
        file.write("new and long")
        file.flush()
        os.fsync(file.fileno())

print(changes(write, folder))
for number in range(1, 6):
    for path in folder.iterdir():
        path.unlink()
    print(forked(killed_at(write, folder, number)).code, {p.name: p.read_text() for p in sorted(folder.iterdir())})
"""


def test_a_program_is_killed_at_every_write(tmp_path):
    """Two files written in place: each point leaves what a kill there would."""
    done = command("-c", SCRIPT, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "4",
        "-9 {}",
        "-9 {'a': 'new and long'}",
        "-9 {'a': 'new and long', 'b': 'new an'}",
        "-9 {'a': 'new and long', 'b': 'new and long'}",
        "0 {'a': 'new and long', 'b': 'new and long'}",
    ]
