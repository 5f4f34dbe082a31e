"""Hostile files: each is refused in one line, within seconds and a gigabyte; and a short run of mutants."""

import json
import re
import subprocess
import sys

import pytest

from ldm.errors import InputError
from ldm.patterns import Patterns
from tests.campaign.fuzz_torch_files import run
from tests.conftest import ROOT
from tests.runs import ENVIRONMENT

pytestmark = pytest.mark.slow

SECONDS, BYTES = 20, 10**9  # of the processor; most take a few hundredths of a second


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What came of each, in a process of its own, which a signal would end."""
    folder = tmp_path_factory.mktemp("hostile")
    words = [sys.executable, "-m", "tests.campaign.read_hostile_files", str(folder)]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_each_is_refused_in_one_line_or_read(told):
    wrong = []
    for case in told:
        said, expected = case["said"], case["expected"]
        is_right = expected in (None, ".*") if said is None else bool(expected and re.search(expected, said))
        if not is_right or "\n" in (said or "") or "weights_only" in (said or ""):
            wrong.append((case["name"], expected, said))
    assert not wrong
    assert len(told) > 150


def test_each_ends_soon_and_takes_little_memory(told):
    assert [case["name"] for case in told if case["seconds"] > SECONDS] == []
    assert [case["name"] for case in told if case["grown"] > BYTES] == []


def test_mutants_of_torch_files():
    tried = run(300, seed=3)
    assert tried["read"] + tried["refused"] == 300 and tried["read"] and tried["tensors"]


def test_patterns_of_files_have_a_time_limit():
    patterns = Patterns("file", seconds=0)
    with pytest.raises(InputError, match="file: matching its pattern 'a' takes too long"):
        patterns.search("a", "a")
    assert Patterns("file").fullmatch(r"(.*\.)?to_[qk]", "a.to_q") and not Patterns("file").fullmatch("to_q", "a.to_q")
    with pytest.raises(InputError, match="is not a regular expression"):
        Patterns("file").search("(", "a")
