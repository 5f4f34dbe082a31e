"""What `benchmarks/gpu.py` measures: each work is made ready by one function, whose result is called for each figure.

At toy size (`Size.toy`) the same functions run tiny networks on a CPU in a second.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import caches
import common
import memory
import sampling
import scaling
import torch
import train_step

from ldm.train.compiled import compile_module

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "diffusers", "peft", "transformers", "pytorch-lightning", "numpy")
Work = Callable[[], dict[str, Any]]


class Size(NamedTuple):
    device: torch.device
    toy: bool

    @property
    def pixels(self) -> int:
        return 64 if self.toy else 512

    def __call__(self, real: Any, toy: Any) -> Any:
        """One of two numbers."""
        return toy if self.toy else real


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def repeated(work: Callable[[], Any], size: Size, times: int, units: int, warm_up: int) -> Work:
    """Seconds of each of `units` in `times` calls of `work`, and the memory at its peak after warming up."""
    for _ in range(warm_up):
        work()
    wait(size.device)
    if size.device.type == "cuda":
        torch.cuda.empty_cache()  # building is not part of the work
        torch.cuda.reset_peak_memory_stats(size.device)

    def once() -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(times):
            work()
        wait(size.device)
        taken = {"seconds": (time.perf_counter() - start) / (times * units)}
        if size.device.type == "cuda":
            taken["allocated"] = torch.cuda.max_memory_allocated(size.device) / memory.GIB
            taken["reserved"] = torch.cuda.max_memory_reserved(size.device) / memory.GIB
        return taken

    return once


# --- a training step: 512 pixels, a picture of the subject and one of its class


def compiled(mode: str) -> Callable[[torch.nn.Module], None]:
    return partial(compile_module, mode=mode)


def training(size: Size, prepare: list) -> Work:
    """Ours: the frozen base in bf16, adapters in fp32."""
    step = train_step.step_of(train_step.ours, size.pixels, prepare=prepare, device=size.device, toy=size.toy,
                              frozen=torch.bfloat16)  # fmt: skip
    return repeated(step, size, times=size(10, 1), units=1, warm_up=size(5, 1))


def peer_training(size: Size, prepare: list) -> Work:
    """As diffusers' trainers do it: the frozen base in bf16, LoRA in fp32, all under autocast."""
    step = train_step.step_of(train_step.peer, size.pixels, autocast=True, prepare=prepare, device=size.device,
                              toy=size.toy, frozen=torch.bfloat16)  # fmt: skip
    return repeated(step, size, times=size(10, 1), units=1, warm_up=size(5, 1))


def compiled_peer(mode: str) -> Callable[[torch.nn.Module], None]:
    return lambda unet: unet.to(memory_format=torch.channels_last).compile(mode=mode)


# --- 50 steps of DDIM with guidance, four pictures of 512 pixels


def drawing(size: Size, make: Callable, mode: str | None, dtype: torch.dtype = torch.bfloat16) -> Work:
    steps, batch = size(50, 2), size(4, 1)
    work = make(size.device, dtype, mode, size.pixels, steps, batch, size.toy)
    return repeated(work, size, times=1, units=batch, warm_up=1)


# --- the rest


def encoded_once(size: Size) -> Work:
    measured = caches.whole_step(size.device, size("bf16", "fp32"), size.pixels, size.toy)
    return lambda: {"rows": measured(size(10, 1))}


def growth(size: Size) -> Work:
    """Steps of the small model, and those of Stable Diffusion v1 with a bf16 base at growing batches."""

    def measured() -> dict[str, Any]:
        series = size(scaling.SERIES, {"trainings": [1, 2]})
        result = {f"SD-mini: {name}": row for name, row in scaling.measured(series, size(10, 1), size.device).items()}
        batches, seconds = size([1, 2, 4, 8], [1, 2]), []
        for batch in batches:
            step = train_step.step_of(train_step.ours, size.pixels, device=size.device, batch=batch, toy=size.toy,
                                      frozen=torch.bfloat16)  # fmt: skip
            seconds.append(statistics.median(common.timed(step, size(10, 1), size.device, warm_up=size(3, 1))))
        result["SD v1: batch"] = {"sizes": batches, "seconds": seconds, "exponent": scaling.exponent(batches, seconds)}
        return {"series": result}

    return measured


def needed(size: Size, name: str) -> Work:
    """Measured and predicted memory of one case."""
    case = memory.CASES[name]
    if size.toy:
        case = case._replace(size=64, toy=True)

    def both() -> dict[str, Any]:
        found = memory.measured(case, size.device)
        return {**found, "predicted": memory.predicted(case)}

    return both


def machine(size: Size) -> Work:
    """What the figures depend on, and two ceilings: a product of 8192 x 8192 in bf16, and a copy on the device."""

    def told() -> dict[str, Any]:
        side, device = size(8192, 64), size.device
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        product = statistics.median(common.timed(lambda: a @ b, 10, device, warm_up=3))
        source = torch.empty(size(2**30, 2**10), dtype=torch.uint8, device=device).random_()
        target = torch.empty_like(source)
        copy = statistics.median(common.timed(lambda: target.copy_(source), 10, device, warm_up=3))
        return {
            "bf16 product, TFLOP/s": 2 * side**3 / product / 1e12,
            "copy, GB/s read and written": 2 * source.numel() / copy / 1e9,
        }

    return told


def about(size: Size) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    told = {"cpu": common.machine().split(", ")[0], "python": platform.python_version(), "versions": versions}
    if size.device.type != "cuda":
        return {"gpu": "no GPU", **told}
    properties = torch.cuda.get_device_properties(size.device)
    return {"gpu": properties.name, "memory, GiB": properties.total_memory / memory.GIB,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), **told}  # fmt: skip


def gpu_tests(size: Size) -> Work:
    """The tests that are marked `gpu`, and how they went."""
    several = ["-n", "3", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    words = ["--version"] if size.toy else [*map(str, marked_files()), "-m", "gpu", *several]
    return lambda: pytest_of(words)


def marked_files() -> list[Path]:
    """Only the files that have such tests: collecting all takes longer than running these."""
    marked = re.compile(r"^(pytestmark = .*|@pytest\.)mark\.gpu\b", re.MULTILINE)
    return sorted(p for p in (ROOT / "tests").rglob("test_*.py") if marked.search(p.read_text(encoding="utf-8")))


def pytest_of(words: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *words]
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": python_path()})
        return {"exit code": int(done.returncode), **(outcomes(report) if report.exists() else {})}


def python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def outcomes(report: Path) -> dict[str, Any]:
    """How many tests passed, which failed or were skipped and why, from a JUnit report."""
    result: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}, "slowest": {}}
    for case in ElementTree.parse(report).getroot().iter("testcase"):  # noqa: S314 (we have just written it)
        name = f"{case.get('classname')}::{case.get('name')}"
        result["slowest"][name] = float(case.get("time", 0))
        [problem] = [*case.iter("failure"), *case.iter("error"), *case.iter("skipped")][:1] or [None]
        if problem is None:
            result["passed"] += 1
        else:
            kind = "skipped" if problem.tag == "skipped" else "failed"
            result[kind][name] = str(problem.get("message", "")).split("\n")[0][:300]
    slowest = sorted(result["slowest"].items(), key=lambda pair: -pair[1])[:5]
    return result | {"slowest": dict(slowest)}


WORKS: dict[str, Callable[[Size], Work]] = {
    "machine": machine,
    "tests": gpu_tests,
    "train_step/ours, compiled, CUDA graphs": partial(training, prepare=[compiled("reduce-overhead")]),
    "train_step/ours, compiled": partial(training, prepare=[compiled("default")]),
    "train_step/ours": partial(training, prepare=[]),
    "train_step/diffusers + peft": partial(peer_training, prepare=[]),
    "train_step/diffusers + peft, compiled": partial(peer_training, prepare=[compiled_peer("default")]),
    "train_step/diffusers + peft, compiled, CUDA graphs": partial(
        peer_training, prepare=[compiled_peer("reduce-overhead")]
    ),
    "sample/ours": partial(drawing, make=sampling.ours, mode=None),
    "sample/ours, compiled, CUDA graphs": partial(drawing, make=sampling.ours, mode="reduce-overhead"),
    "sample/diffusers": partial(drawing, make=sampling.peer, mode=None),
    "sample/diffusers, compiled": partial(drawing, make=sampling.peer, mode="default"),
    "sample/diffusers, compiled, CUDA graphs": partial(drawing, make=sampling.peer, mode="reduce-overhead"),
    "caches/steps": encoded_once,
    "scaling/series": growth,
    **{f"memory/{name}": partial(needed, name=name) for name in memory.CASES},
}
