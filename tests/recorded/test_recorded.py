"""Losses, tuned weights and pictures are those that were recorded: digit for digit on the machine of the recording."""

import json

import pytest
import torch

from tests.recorded.cases import CASES, run
from tests.recorded.compare import EXACT, Tolerance, tolerance, unequal
from tests.recorded.inputs import make
from tests.recorded.machine import MACHINE, THREADS, differences
from tests.recorded.record import read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make(tmp_path_factory.mktemp("recorded") / "inputs")


@pytest.fixture(scope="module")
def exact():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield not differences(json.loads(MACHINE.read_text()))
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_recorded(name, inputs, exact, tmp_path):
    if name == "train-autoencoder":
        pytest.importorskip("taming")
    found = unequal(run(name, inputs, tmp_path / "run"), read(name), tolerance(name, exact))
    how = "bit for bit" if exact else "within tolerances, on another machine than that of the recording"
    assert not found, f"compared {how}: {len(found)} differences, first ten:\n" + "\n".join(found[:10])


def test_a_resumed_run_is_recorded_as_the_run_that_never_stopped():
    whole, parts = read("attn2o-ffni"), read("resumed")
    assert {key: whole[key] for key in parts} == parts


def test_what_differs_is_found():
    recorded = {
        "losses": {"train/loss": [1.0, 0.5]},
        "tensors": {"a.safetensors": {"w": ["float32 [2]", "12", 0.25, 0.5]}},
        "metadata": {"step": 20, "families": [{"target": "a"}], "files": {"a": {"tensors": 1, "sha256": "ab"}}},
        "pictures": [{"size": [8, 8], "sha256": "ab", "means": "0a" * 192}],
    }
    other = {
        "losses": {"train/loss": [1.0, 0.52]},
        "tensors": {"a.safetensors": {"w": ["float32 [2]", "13", 0.25, 0.6]}},
        "metadata": {"step": 20, "families": [{"target": "b"}], "files": {"a": {"tensors": 1}}, "more": 1},
        "pictures": [{"size": [8, 8], "sha256": "ac", "means": "14" * 192}],
    }
    slight = {
        "losses": {"train/loss": [1.0, 0.5000001]},
        "tensors": {"a.safetensors": {"w": ["float32 [2]", "13", 0.25, 0.5]}},
        "metadata": {
            "step": 20,
            "families": [{"target": "a", "family": "b"}],
            "files": {"a": {"tensors": 1, "sha256": "ac"}},
        },
        "pictures": [{"size": [8, 8], "sha256": "ac", "means": "0a" * 192}],
    }
    for allowed in (EXACT, Tolerance()):
        assert unequal(recorded, recorded, allowed) == []
        assert len(unequal(other, recorded, allowed)) == (5 if allowed == EXACT else 4)
        assert len(unequal({}, recorded, allowed)) == 4
    assert len(unequal(slight, recorded, EXACT)) == 4
    assert unequal(slight, recorded, Tolerance()) == []
