"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest
import torch

# The models are tiny: more threads only wait for each other, above all where pytest runs two processes.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Nothing is downloaded: without this, a tokenizer that is not there is looked for in vain for twenty seconds.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with reference numbers and photographs that lies beside the checkout."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("the folder ../shared with reference numbers and photographs is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Numbers produced by the published reference implementations."""
    return shared / "reference"


def pytest_terminal_summary(terminalreporter):
    """Say how the recorded numbers were compared, for a comparison within tolerances sees less."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    if any(str(getattr(report, "nodeid", "")).startswith("tests/recorded/") for report in reports):
        from tests.recorded.machine import summary

        terminalreporter.write_line(summary())
