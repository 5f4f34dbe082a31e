"""The house: floors, what may be imported where, how weights are read, and forward passes that name their positions."""

import ast
from pathlib import Path

import pytest

from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from tests.conftest import ROOT

# The floor of every room; the longest prefix of a module's name decides.
FLOORS = {
    "ldm.errors": 0,
    "ldm.config": 0,
    "ldm.schema": 0,
    "ldm.files": 0,
    "ldm.writing": 0,
    "ldm.devices": 0,
    "ldm.cli": 0,
    "ldm.patterns": 0,
    "ldm.pickles": 0,
    "ldm.trust": 0,
    "ldm.checkpoints": 0,
    "ldm.modules": 1,
    "ldm.lr_scheduler": 1,
    "ldm.muon": 1,
    "ldm.tuning": 2,
    "ldm.models": 3,
    "ldm.data": 4,
    "ldm.generate": 4,
    "ldm.util": 4,
    "ldm.interchange": 4,
    "ldm.train": 5,
    "ldm.evaluate": 5,
    "ldm.commands": 7,
    "ldm.__main__": 7,
    "main_dream_booth": 7,
    "sample": 7,
    "scripts": 7,
}
FILES = sorted([*(ROOT / "ldm").rglob("*.py"), *(ROOT / "scripts").rglob("*.py"), *ROOT.glob("*.py")])
FILES = [path for path in FILES if path.name != "setup.py"]
PROGRAMS = [ROOT / "ldm/__main__.py", *(ROOT / "ldm/commands").glob("*.py")]
LIBRARY = [path for path in FILES if path.is_relative_to(ROOT / "ldm") and path not in PROGRAMS]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int | None:
    rooms = [room for room in FLOORS if module == room or module.startswith(room + ".")]
    return FLOORS[max(rooms, key=len)] if rooms else None


def imports(path: Path) -> set[str]:
    """Every module that a file imports, also within functions, and every name that might be a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_room_imports_only_from_floors_below_it(path):
    own = module_of(path)
    if own == "ldm":
        return
    assert floor(own) is not None, f"{own} is on no floor"
    above = {module for module in imports(path) if (floor(module) or 0) > floor(own)}
    assert not above


def test_a_lazy_import_counts():
    """This test can fail: LDM's face imports what builds models within a function."""
    assert "ldm.models.building" in imports(ROOT / "ldm" / "util.py")
    assert floor("ldm.modules.taps") == 1 and floor("ldm.train.run") == 5 and floor("torch") is None


@pytest.mark.parametrize("path", [p for p in LIBRARY if {"modules", "tuning"} & set(p.parts)], ids=name)
def test_modules_and_tuning_do_not_know_lightning(path):
    assert not {module for module in imports(path) if module.split(".")[0] in ("pytorch_lightning", "lightning")}


def test_programs_change_no_search_path():
    """They import what is installed, or what lies beside them."""
    for path in FILES:
        assert "sys.path" not in path.read_text() and "noqa: E402" not in path.read_text(), name(path)


def test_no_torchvision():
    users = {name(path) for path in FILES for module in imports(path) if module.split(".")[0] == "torchvision"}
    assert not users
    assert "torchvision" not in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_the_library_logs_and_does_not_print(path):
    assert not [call.lineno for call in calls(path) if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_weights_are_read_safely_and_on_any_device(path):
    for call in calls(path):
        if not isinstance(call.func, ast.Attribute):
            continue
        spoken = ast.unparse(call.func)
        unsafe = ("torch.load", "pickle.load", "pickle.loads", "torch.jit.load", "np.load", "numpy.load")
        assert spoken not in unsafe, f"line {call.lineno}: ldm.checkpoints reads weights"
        assert call.func.attr != "cuda", f"line {call.lineno}: no device is assumed"


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
