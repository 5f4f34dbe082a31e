"""The package as a wheel, in an environment of its own: it draws a picture, far from any checkout."""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.runs import ENVIRONMENT

pytestmark = pytest.mark.slow

SOURCES = ("setup.py", "pyproject.toml", "ldm", "main_dream_booth.py", "sample.py")
DATA = ("configs", "models/sd-mini", "examples/subjects", "examples/regularization_captions.txt")
ALONE = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}


def run(*words: object, cwd: Path) -> str:
    done = subprocess.run([*map(str, words)], cwd=cwd, env=ALONE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since building leaves folders beside the sources."""
    copy = tmp_path_factory.mktemp("sources")
    for name in (*SOURCES, *DATA):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", copy / "dist", copy)
    run(sys.executable, *build, cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An environment that has the wheel, and beside it the packages that the tests run with, but no checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files are not read
    return folder / "bin"


def test_the_wheel_holds_what_it_needs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    data = [path for name in DATA for path in (ROOT / name, *(ROOT / name).rglob("*")) if path.is_file()]
    shipped = [f"ldm/_data/{path.relative_to(ROOT)}" for path in data if path.suffix != ".pyc"]
    assert len(shipped) > 100 and not set(shipped) - names
    assert "ldm/py.typed" in names and "sample.py" in names and "main_dream_booth.py" in names
    vocabulary = "ldm/modules/encoders/clip_vocabulary/"
    assert {vocabulary + "merges.txt.gz", vocabulary + "LICENSE"} <= names
    assert {f"ldm/study/report/page/page.{ending}" for ending in ("html", "css", "js")} <= names
    assert not [name for name in names if name.startswith(("scripts", "tests", "ldm/data/build"))]


def test_it_draws_a_picture_anywhere(installed, tmp_path):
    where = run(installed / "python", "-c", "import ldm; print(ldm.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    words = ("--config", "configs/sd-mini/inference.yaml", "--ddim_steps", 2, "--n_iter", 1, "--device", "cpu")
    said = run(installed / "ldm", "sample", *words, "--prompt", "a cat", "--skip_grid", "--outdir", "out", cwd=tmp_path)
    picture = tmp_path / "out" / "samples" / "00000.png"
    assert "out/samples/00000.png" in said
    with Image.open(picture) as drawn:
        assert drawn.size == (64, 64) and drawn.text["prompt"] == "a cat" and len(drawn.getcolors(64 * 64)) > 100
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["ldm", "lora_add", "lora_distill", "lora_pti"])
def test_its_commands_answer(installed, name, tmp_path):
    assert run(installed / name, "--help", cwd=tmp_path).startswith(f"usage: {name} ")
