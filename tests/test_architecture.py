"""The house: floors, no code that assumes CUDA, and forward passes that name their positions."""

import ast
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from tests.conftest import ROOT


def lint_imports(config: Path) -> subprocess.CompletedProcess:
    """In a process of its own, for it switches off the loggers that exist."""
    words = "import importlinter.cli as c; c.lint_imports_command()"
    command = [sys.executable, "-c", words, str(config), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_rooms_import_only_from_floors_below_them():
    """The contracts are in pyproject.toml."""
    done = lint_imports(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_imports_within_functions_count():
    """LDM's face imports what builds models within a function."""
    graph = grimp.build_graph("ldm", cache_dir=None)
    assert "ldm.models.building" in graph.find_modules_directly_imported_by("ldm.util")


def test_a_contract_can_be_broken(tmp_path):
    config = tmp_path / "pyproject.toml"
    config.write_text(
        "[tool.importlinter]\nroot_packages = ['ldm']\n[[tool.importlinter.contracts]]\n"
        "name = 'upside down'\ntype = 'layers'\nlayers = ['ldm.models', 'ldm.util']\n"
    )
    done = lint_imports(config)
    assert done.returncode == 1 and "upside down BROKEN" in done.stdout


def test_no_device_is_assumed():
    for path in [*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            assert not (called and node.func.attr == "cuda"), f"{path}, line {node.lineno}: use `.to(device)`"


def test_torchvision_is_not_installed():
    assert "torchvision" not in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("block", [BasicTransformerBlock, ResBlock])
def test_the_forward_pass_names_its_positions_in_their_order(block):
    tree = ast.parse(Path(__import__(block.__module__, fromlist="_").__file__).read_text())
    (cls,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == block.__name__]
    (forward,) = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "_forward"]
    taps = [
        node for node in ast.walk(forward)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tap"
    ]  # fmt: skip
    spoken = [tap.args[0].value for tap in sorted(taps, key=lambda tap: (tap.lineno, tap.col_offset))]
    assert spoken == list(block.positions)
    assert set(block.writable) <= set(block.positions)


def test_the_top_level_is_that_of_the_house():
    wanted = "configs ldm scripts tests benchmarks main_dream_booth.py sample.py environment.yaml setup.py README.md"
    assert all((ROOT / entry).exists() for entry in wanted.split())
