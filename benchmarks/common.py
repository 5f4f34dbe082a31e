"""What the benchmarks share: timing, tables with ratios, a full-size checkpoint of random weights."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))


def parser(description: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--repeats", type=int, default=3, help="timed runs of each")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    p.add_argument("--device", type=torch.device, default=best_device(), help="what computes")
    p.add_argument("--json", action="store_true", help="print the numbers for machines")
    return p


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_random_weights(
    model: torch.nn.Module, device: torch.device, frozen: torch.dtype = torch.float32
) -> torch.nn.Module:
    """Move a model to a device and draw its weights there, at a scale that keeps activations finite.

    `frozen`: the type of those that do not learn. A model that was built under `skip_init` takes no memory of the host,
    since nothing was ever written to its weights.
    """
    for parameter in model.parameters():
        dtype = torch.float32 if parameter.requires_grad else frozen
        parameter.data = torch.empty_like(parameter, device=device, dtype=dtype).normal_(std=0.02)
    return model.to(device)


def can_compute(precision: str, device: torch.device) -> bool:
    """Whether a device supports a precision; prints a line if it does not."""
    from ldm.train.trainer_section import computes_on_cpu

    able = device.type != "cpu" or computes_on_cpu(precision)
    if not able:
        print(f"{precision}: nothing measured, this CPU has no such arithmetic and there is no GPU")
    return able


def timed(
    work: Callable[[], Any],
    repeats: int,
    device: torch.device | None = None,
    warm_up: int = 1,
    before: Callable[[], Any] = lambda: None,
) -> list[float]:
    """Seconds of each of `repeats` runs, after `warm_up` untimed ones. Waits for the device; `before` is not timed."""
    seconds = []
    for _ in range(warm_up + repeats):
        before()
        start = time.perf_counter()
        work()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds[warm_up:]


def in_turns(
    works: dict[str, Callable[[], Callable[[], Any]]], repeats: int, threads: int, memory: Callable[[], float] = float
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each of `repeats` runs of each work, in turns, and by how much `memory` grew during them.

    `works` make, each in a process of its own that lives until the end, what is then timed there. So what the machine
    is at some hour touches all alike, and what one keeps in memory none of the others.
    """
    with ExitStack() as stack:
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in works}
        before = {name: p.submit(_make, works[name], threads, memory).result() for name, p in processes.items()}
        rounds = [{name: p.submit(_once).result() for name, p in processes.items()} for _ in range(1 + repeats)]
        after = {name: p.submit(memory).result() for name, p in processes.items()}
    return {name: [r[name] for r in rounds[1:]] for name in works}, {name: after[name] - before[name] for name in works}


_work: Callable[[], Any]  # of a process of `in_turns`


def _make(make: Callable[[], Callable[[], Any]], threads: int, memory: Callable[[], float]) -> float:
    global _work
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    _work = make()
    return memory()


def _once() -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return timed(_work, repeats=1, device=device, warm_up=0)[0]


def table(
    rows: dict[str, list[float]],
    peer: str,
    as_json: bool,
    unit: str = "s",
    more: dict[str, dict[str, float]] | None = None,
) -> None:
    """Median, spread and ratio to the peer's median of each row; the peer is one of them. `more`: further columns."""
    more = more or {}
    base = statistics.median(rows[peer])
    result = {
        name: {"median": statistics.median(v), "min": min(v), "max": max(v), "ratio": statistics.median(v) / base}
        | {column: values[name] for column, values in more.items()}
        for name, v in rows.items()
    }
    if as_json:
        print(json.dumps({"machine": machine(), "peer": peer, "unit": unit, "rows": result}))
        return
    width = max(map(len, rows))
    print(machine())
    print(f"| {'work':{width}} | median {unit} | min - max | ratio to {peer} |" + "".join(f" {c} |" for c in more))
    print(f"| {'-' * width} | ---: | ---: | ---: |" + " ---: |" * len(more))
    for name, r in result.items():
        told = f"| {name:{width}} | {r['median']:.3f} | {r['min']:.3f} - {r['max']:.3f} | {r['ratio']:.2f} |"
        print(told + "".join(f" {r[column]:.2f} |" for column in more))


def machine() -> str:
    """The processor, its threads and the versions that a number depends on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = f"{models[0]} x {len(models)}" if models else name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, {torch.get_num_threads()} threads, {gpu}, torch {torch.__version__}"
