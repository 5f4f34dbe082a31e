"""`make gpu` at toy size on the CPU: every work runs, and what fails, dies or hangs stops nothing."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

# Children without torch: the last word says what becomes of them.
CHILD = """
import sys, time
from workers import serve
kind = sys.argv[1]
def make():
    if kind == "breaks":
        raise ValueError("no such network")
    if kind == "hangs":
        time.sleep(600)
    calls = []
    def work():
        print("what libraries print")
        calls.append(1)
        if kind == "dies" and len(calls) == 2:
            sys.exit("out of memory")
        if kind == "told":
            return {"allocated": 2.0, "predicted": 1.9}
        return {"seconds": 0.25 * len(calls), "allocated": 3.0}
    return work, {"gpu": "Toy GPU 1"}
serve(make)
"""


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(ROOT / "benchmarks")):
            del sys.modules[name]


def day(gpu, folder, works, minutes=0.05):
    """A run of `gpu.py` whose works are such children; what it wrote."""

    class Day(gpu.Day):
        def command(self, stage, work):
            return [sys.executable, "-c", CHILD, work.split(", ")[-1]]

    options = gpu.parsed(["--results", str(folder), "--minutes", str(minutes), "--at_once", "4", "--stages", *works])
    record = gpu.Record(folder, "python benchmarks/gpu.py")
    Day(options, record, folder).run()
    return json.loads((folder / "toy-gpu-1.json").read_text())


def test_what_fails_stops_nothing(benchmark, tmp_path, monkeypatch):
    gpu = benchmark("gpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "benchmarks"))
    works = ("diffusers + peft", "diffusers + peft, compiled", "breaks", "hangs", "dies")
    monkeypatch.setitem(gpu.STAGES, "train_step", gpu.Stage(3, 1.0, works))
    monkeypatch.setitem(gpu.STAGES, "memory", gpu.Stage(0, 0, ("SD v1, told",)))
    written = day(gpu, tmp_path, ["train_step", "memory"])
    found = written["stages"]["train_step"]
    assert found["rows"]["diffusers + peft"]["seconds"] == [0.25, 0.5, 0.75]
    assert found["rows"]["diffusers + peft"]["median"] == 0.5 and found["rows"]["dies"]["seconds"] == [0.25]
    assert found["failed"]["breaks"] == "ended with 1: ValueError: no such network"
    assert found["failed"]["dies"] == "ended with 1: out of memory"
    assert found["failed"]["hangs"] == "not ready within 0.05 minutes"
    assert written["stages"]["memory"]["rows"] == {"SD v1, told": {"allocated": 2.0, "predicted": 1.9}}

    monkeypatch.setitem(gpu.STAGES, "sample", gpu.Stage(1, 1.0, ("diffusers",)))
    assert day(gpu, tmp_path, ["sample"])["stages"].keys() == {"train_step", "memory", "sample"}

    docs = tmp_path / "benchmarks.md"
    tables = benchmark("gpu_tables")
    docs.write_text(f"before\n{tables.BEGIN}\nolder\n{tables.END}\nafter\n")
    tables.write(tmp_path, docs)
    text = docs.read_text()
    assert "older" not in text and text.startswith("before\n") and text.endswith("\nafter\n")
    assert "| diffusers + peft | 500.0 | 250.0 - 750.0 | 4.0 | 1.00 | 1.00 | 3.00 |  |" in text
    assert "- hangs: not measured (not ready within 0.05 minutes)" in text
    assert "| SD v1, told | 2.00 | 1.90 | 0.95 |  |" in text


def test_every_work_at_toy_size(benchmark, monkeypatch, tmp_path):
    gpu, works = benchmark("gpu"), benchmark("gpu_works")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **mode: modes.append(mode["mode"]))
    modes, size = [], works.Size(torch.device("cpu"), toy=True)
    named = {gpu.work_name(stage, work): stage for stage, row in gpu.STAGES.items() for work in row.works}
    assert named.keys() == works.WORKS.keys()
    record = gpu.Record(tmp_path, "python benchmarks/gpu.py --toy")
    alike = {name for name in named if name.endswith(", compiled") or name.startswith("memory/")}
    for name, stage in named.items():
        if name not in alike or name == "memory/SD v1, bf16 base":  # they differ by a word, and each takes seconds
            record.add(stage, name.partition("/")[2], works.WORKS[name](size)())
    record.about = works.about(size)
    assert modes == ["reduce-overhead"] * 4
    text = "\n".join(benchmark("gpu_tables").section(json.loads(record.write().read_text())))
    for words in ("diffusers + peft, compiled, CUDA graphs", "encoded once", "SD v1: batch", "torch 2."):
        assert words in text
    assert "nan" not in text


def test_how_gpu_tests_went(benchmark, tmp_path):
    test = tmp_path / "test_three.py"
    test.write_text("import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
                    "@pytest.mark.skip(reason='no GPU')\ndef test_c(): pass\n")  # fmt: skip
    found = benchmark("gpu_works").pytest_of([str(test), "-p", "no:xdist", f"--rootdir={tmp_path}", "-c", "/dev/null"])
    assert found["exit code"] == 1 and found["passed"] == 1
    assert list(found["failed"].values()) == ["assert 1 == 2"] and list(found["skipped"].values()) == ["no GPU"]
    assert Path(ROOT / "tests/accelerator/test_gpu.py") in benchmark("gpu_works").marked_files()
