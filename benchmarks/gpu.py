"""A GPU measured in minutes: its tests, speed and memory against diffusers + peft, written to benchmarks/results.

    python benchmarks/gpu.py [--minutes 5] [--stages train_step memory]
    python benchmarks/gpu.py --tables            # docs/benchmarks.md from what was measured

Needs one GPU and the packages of `pip install .[bench]`, but neither a network nor an installation of ours. Every work
is a process of its own. All get ready (load, compile, warm up) side by side, which is not timed; then they are timed in
turns, one at a time, nothing else running. What fails or is too slow is reported and stops nothing. Results are written
as they come, so that nothing measured is lost. A later run replaces the stages that it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from workers import Child, Lost, serve

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


class Stage(NamedTuple):
    """Works that are compared. `rounds`: how often each is timed; 0: once, as soon as it is ready, while others run."""

    rounds: int
    limit: float  # seconds that its timing may take
    works: tuple[str, ...]
    peer: str | None = None


STAGES = {
    "train_step": Stage(
        7, 60,
        ("ours, compiled, CUDA graphs", "diffusers + peft, compiled", "diffusers + peft", "ours",
         "diffusers + peft, compiled, CUDA graphs", "ours, compiled"),
        "diffusers + peft",
    ),
    "sample": Stage(
        3, 60,
        ("ours, compiled, CUDA graphs", "diffusers, compiled", "diffusers", "ours",
         "diffusers, compiled, CUDA graphs"),
        "diffusers",
    ),
    "tests": Stage(0, 0, ("tests",)),
    "memory": Stage(
        0, 0,
        ("SD v1, fp32", "SD v1, fp32, checkpointing", "SD v1, bf16 base", "SD v1, bf16 base, checkpointing",
         "SDXL, bf16 base", "SDXL, bf16 base, checkpointing"),
    ),
    "machine": Stage(1, 20, ("machine",)),
    "caches": Stage(1, 30, ("steps",)),
    "scaling": Stage(1, 60, ("series",)),
}  # fmt: skip


def work_name(stage: str, work: str) -> str:
    return stage if stage == work else f"{stage}/{work}"


class Record:
    """The results so far, in a file that is complete at any time."""

    def __init__(self, folder: Path, command: str) -> None:
        self.folder, self.command = folder, command
        self.about: dict[str, Any] = {}
        self.stages: dict[str, dict[str, Any]] = {}

    def add(self, stage: str, work: str, answer: dict[str, Any]) -> None:
        """Store an answer of a work: a timed work has several, any other has one."""
        rows = self._stage(stage)["rows"]
        if "seconds" in answer and isinstance(answer["seconds"], float):
            row = rows.setdefault(work, {"seconds": []})
            row |= {key: value for key, value in answer.items() if key != "seconds"}
            row["seconds"].append(answer["seconds"])
            row |= spread(row["seconds"])
        else:
            rows[work] = answer

    def fail(self, stage: str, work: str, why: str) -> None:
        self._stage(stage)["failed"][work] = why
        told(f"{stage}: {work}: {why}")

    def _stage(self, name: str) -> dict[str, Any]:
        date = time.strftime("%Y-%m-%d", time.gmtime())
        empty = {"command": self.command, "date": date, "rows": {}, "failed": {}}
        return self.stages.setdefault(name, empty)

    def write(self) -> Path | None:
        """Write the results beside those of earlier runs on the same machine; None if there are none yet."""
        if not self.stages:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{slug(self.about.get('gpu', 'unknown'))}.json"
        earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        same = earlier.get("machine") == self.about
        result = {"machine": self.about, "stages": {**(earlier["stages"] if same else {}), **self.stages}}
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        beside.replace(path)
        return path


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


START = time.monotonic()


def told(line: str) -> None:
    print(f"{time.monotonic() - START:6.1f} s  {line}", flush=True)


class Day:
    """One run: the works that have not started, those in preparation, and those that are ready."""

    def __init__(self, options: argparse.Namespace, record: Record, logs: Path) -> None:
        self.options, self.record, self.logs = options, record, logs
        self.end = time.monotonic() + 60 * options.minutes
        self.waiting = [(stage, work) for stage in options.stages for work in STAGES[stage].works]
        self.waiting.sort(key=lambda pair: "compiled" not in pair[1])  # the slowest to prepare starts first
        self.preparing: dict[tuple[str, str], Child] = {}
        self.ready: dict[tuple[str, str], Child] = {}

    def left(self) -> float:
        return self.end - time.monotonic()

    def run(self) -> None:
        try:
            until = time.monotonic() + self.options.preparing * self.left()
            while (self.waiting or self.preparing) and self.left() > 0:
                self.prepare(until)
                for stage in self.options.stages:
                    self.measure(stage)
            for stage, work in (*self.preparing, *self.waiting):
                self.record.fail(stage, work, f"not ready within {self.options.minutes:g} minutes")
        finally:
            for child in (*self.preparing.values(), *self.ready.values()):
                child.end()
            self.record.write()

    # --- getting ready, side by side

    def prepare(self, until: float) -> None:
        """Start works and take the answers of those that are not timed, until all are ready or the time is up.

        A work that is not ready by then pauses while others are timed, and continues afterwards.
        """
        for child in self.preparing.values():
            child.go_on()
        while self.left() > 0 and (time.monotonic() < until or not self.ready):
            while self.waiting and len(self.preparing) + len(self.ready) < self.options.at_once:
                self.start(*self.waiting.pop(0))
            if not self.preparing:
                return
            for pair, child in list(self.preparing.items()):
                self.hear(pair, child)
            time.sleep(0.02)
        for (stage, work), child in self.preparing.items():
            child.pause()
            told(f"{stage}: {work}: not ready after {time.monotonic() - child.started:.0f} s, pauses")

    def start(self, stage: str, work: str) -> None:
        log = self.logs / f"{slug(work_name(stage, work))}.log"
        self.preparing[stage, work] = Child(self.command(stage, work), log, environment(self.options.threads))

    def command(self, stage: str, work: str) -> list[str]:
        return [sys.executable, __file__, "--work", work_name(stage, work), *(["--toy"] * self.options.toy)]

    def hear(self, pair: tuple[str, str], child: Child) -> None:
        stage, work = pair
        try:
            answer = child.answer(until=0)
        except Lost as lost:
            del self.preparing[pair]
            self.record.fail(stage, work, str(lost))
            return
        if answer is None:
            return
        if "ready" in answer:
            self.record.about |= answer["about"]
        if "ready" in answer and STAGES[stage].rounds:
            told(f"{stage}: {work}: ready after {answer['ready']:.0f} s")
            self.ready[pair] = self.preparing.pop(pair)
        elif "ready" in answer:
            child.go()
        else:
            self.preparing.pop(pair).end()
            self.record.add(stage, work, answer)
            self.record.write()

    # --- measuring, one at a time

    def measure(self, stage: str) -> None:
        """Let the ready works of a stage take turns, as often as they should or the time allows."""
        children = {work: self.ready.pop((stage, work)) for work in STAGES[stage].works if (stage, work) in self.ready}
        until = min(self.end, time.monotonic() + STAGES[stage].limit)
        for number in range(STAGES[stage].rounds):
            for work, child in list(children.items()):
                if number and time.monotonic() > until:
                    break
                try:
                    child.go()
                    answer = child.answer(until)
                    if answer is None:
                        raise Lost("no answer within the time of its stage")
                    self.record.add(stage, work, answer)
                except Lost as lost:
                    self.record.fail(stage, work, str(lost))
                    children.pop(work).end()
        for child in children.values():
            child.end()
        if children:
            self.record.write()
            told(f"{stage}: measured")


def environment(threads: int) -> dict[str, str]:
    """The environment of a child process: no network, few compiler threads, a shared cache of compiled kernels."""
    cache = Path(tempfile.gettempdir()) / "ldm-compiled"
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(cache)),
    }


def gpu_memory() -> float:
    """GiB of the first GPU, 0 without one. Does not ask torch, because this process does not import it."""
    words = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20)
        return float(done.stdout.split()[0]) / 1024
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return 0.0


def parsed(words: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=9, help="time for everything (default 9)")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="these alone, in this order")
    p.add_argument("--preparing", type=float, default=0.6, help="share of the time for getting ready (default 0.6)")
    p.add_argument("--at_once", type=int, help="processes at once (default: one for each core and 6 GiB of GPU memory)")
    p.add_argument("--threads", type=int, default=2, help="CPU threads of each (default 2)")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    p.add_argument("--logs", type=Path, help="folder for what the processes print; by default a temporary one")
    p.add_argument("--toy", action="store_true", help="tiny networks on the CPU: does everything run?")
    p.add_argument("--tables", action="store_true", help="write the tables of docs/benchmarks.md from the results")
    p.add_argument("--work", help=argparse.SUPPRESS)
    options = p.parse_args(words)
    options.at_once = options.at_once or max(2, min(os.cpu_count() or 1, int(gpu_memory() // 6)))
    return options


def main() -> None:
    options = parsed()
    if options.work:
        serve(lambda: made(options.work, options.toy))
        return
    if options.tables:
        from gpu_tables import write

        write(options.results)
        return
    if not (options.toy or gpu_memory()):
        raise SystemExit("error: no NVIDIA GPU is here (nvidia-smi names none); --toy tries everything on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    record = Record(options.results, " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]))
    with tempfile.TemporaryDirectory() as folder:
        logs = options.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        Day(options, record, logs).run()
    for line in summary(record):
        print(line)
    print(f"written: {record.write()}")


def made(work: str, toy: bool) -> tuple[Any, dict[str, Any]]:
    """Call the function of a work, in a child process; what it returns, and the description of the machine."""
    import torch
    from gpu_works import WORKS, Size, about

    torch.manual_seed(0)
    size = Size(torch.device("cpu" if toy else "cuda"), toy)
    return WORKS[work](size), about(size)


def summary(record: Record) -> Iterator[str]:
    """A short summary, one line per figure."""
    for stage, found in record.stages.items():
        for work, row in found["rows"].items():
            yield f"{stage}: {work}: " + json.dumps({k: v for k, v in row.items() if k != "seconds"})
        for work, why in found["failed"].items():
            yield f"{stage}: {work}: FAILED: {why}"


if __name__ == "__main__":
    main()
