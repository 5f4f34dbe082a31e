"""What runs on a CPU runs on an accelerator, and waits for it nowhere that it need not."""

import os
import subprocess
import sys

import pytest

from ldm.config import find_file
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.mark.skipif(
    not find_file("models/sd-mini/model.safetensors").is_file(), reason="the small model is not in this checkout"
)
def test_on_a_pretended_accelerator():
    """In a process of its own, since torch cannot forget a device."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/accelerator/cases.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
