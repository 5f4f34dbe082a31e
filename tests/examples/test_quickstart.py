"""The notebook runs from top to bottom, with fewer steps."""

import ast
import json

import matplotlib
import pytest

from ldm.interchange import identify
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
NOTEBOOK = ROOT / "examples/quickstart.ipynb"
FEW = {"STEPS": 2, "DRAW_STEPS": 2, "SEEDS": [0, 1], "CLASS_PICTURES": 2}


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    held = {"__name__": "quickstart"}
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None  # pictures would bloat the repository
            source = "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", []):
                assert {target.id for line in ast.parse(source).body for target in line.targets} == FEW.keys()
                held |= FEW
            else:
                exec(compile(source, "quickstart.ipynb", "exec"), held)
    assert held["compared"].size[0] == 2 * 134 + 6 and held["gridded"].size[0] == 3 * 134 + 6
    assert held["means"] and held["figure"].axes
    assert identify(held["exported"]) == "diffusers"
