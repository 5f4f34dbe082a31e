"""The section of docs/benchmarks.md that is written from the files in benchmarks/results."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs/benchmarks.md"
BEGIN, END = "<!-- from benchmarks/results: begin -->", "<!-- from benchmarks/results: end -->"
PEERS = {"train_step": "diffusers + peft", "sample": "diffusers"}
UNITS = {"train_step": "ms per step", "sample": "ms per picture"}
WORDS = {
    "train_step": (
        "A training step of Stable Diffusion v1 (random weights): 512 pixels, one picture of the subject and one of",
        "its class, frozen base in bf16. Ours: adapters `attn2o-ffni` in fp32. The peer: LoRA of rank 4 in fp32, under",
        "autocast. GiB: what torch allocated at its peak, and reserved.",
    ),
    "sample": (
        "Sampling at Stable Diffusion v1 size: four pictures of 512 pixels at once, 50 steps of DDIM with guidance,",
        "bf16, without the autoencoder.",
    ),
    "memory": (
        "The peak of a training step with one picture of the subject and one of its class, in GiB: what torch",
        "allocated, what `ldm plan` predicts (SD v1: 512 pixels, SDXL: 1024), what torch reserved.",
    ),
}


def write(folder: Path, docs: Path = DOCS) -> None:
    """Replace what is between the two markers by the tables of every file."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    text = docs.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"error: {docs} needs the lines {BEGIN} and {END} once each, around the tables")
    before, rest = text.split(BEGIN)
    lines = [line for one in found for line in section(one)]
    docs.write_text("\n".join([before + BEGIN, "", *lines, END]) + rest.split(END)[1], encoding="utf-8")


def section(result: dict[str, Any]) -> Iterator[str]:
    """The tables of one GPU, in Markdown."""
    about, stages = result["machine"], result["stages"]
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items() if version)
    memory = f", GPU memory {about['memory, GiB']:.0f} GiB" if "memory, GiB" in about else ""
    yield f"### {about.get('gpu', 'unknown')}"
    yield ""
    yield f"{about.get('cpu', 'unknown CPU')}{memory}; Python {about.get('python')}, {versions}."
    for name, stage in stages.items():
        yield ""
        yield f"**{name}** (`{stage['command']}`, {stage['date']})"
        if stage["rows"]:
            yield ""
            yield from KINDS.get(name, timed)(name, stage)
        if stage["failed"]:
            yield ""
            yield from (f"- {work}: not measured ({why})" for work, why in stage["failed"].items())
    yield ""


def timed(name: str, stage: dict[str, Any]) -> Iterator[str]:
    """Median, spread, rate, ratio to the peer and to the peer's compiled form, memory."""
    rows = stage["rows"]
    eager, compiled = (rows.get(peer, {}).get("median") for peer in (PEERS[name], PEERS[name] + ", compiled"))
    yield from WORDS[name]
    yield ""
    columns = (UNITS[name], "min - max", "pictures/s", "faster than the peer", "than it compiled", "GiB", "reserved")
    yield "| work | " + " | ".join(columns) + " |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for work, row in sorted(rows.items(), key=lambda pair: -pair[1]["median"]):
        pictures = (2 if name == "train_step" else 1) / row["median"]
        spread = f"{1000 * row['min']:.1f} - {1000 * row['max']:.1f}"
        cells = [f"{1000 * row['median']:.1f}", spread, f"{pictures:.1f}", ratio(eager, row), ratio(compiled, row)]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ("allocated", "reserved")]
        yield f"| {work} | " + " | ".join(cells) + " |"


def ratio(peer: float | None, row: dict[str, Any]) -> str:
    return f"{peer / row['median']:.2f}" if peer else ""


def memory(name: str, stage: dict[str, Any]) -> Iterator[str]:
    yield from WORDS[name]
    yield ""
    yield "| case | allocated | predicted | predicted / allocated | reserved |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for case, row in stage["rows"].items():
        reserved = f"{row['reserved']:.2f}" if "reserved" in row else ""
        yield (f"| {case} | {row['allocated']:.2f} | {row['predicted']:.2f} | "
               f"{row['predicted'] / row['allocated']:.2f} | {reserved} |")  # fmt: skip


def caches(_: str, stage: dict[str, Any]) -> Iterator[str]:
    yield "| work | ms | min - max | ratio |"
    yield "| --- | ---: | ---: | ---: |"
    for found in stage["rows"].values():
        base = statistics.median(next(iter(found["rows"].values())))
        for work, seconds in found["rows"].items():
            middle, low, high = statistics.median(seconds), min(seconds), max(seconds)
            yield f"| {work} | {1000 * middle:.1f} | {1000 * low:.1f} - {1000 * high:.1f} | {middle / base:.2f} |"


def scaling(_: str, stage: dict[str, Any]) -> Iterator[str]:
    yield "| what grows | sizes | ms per step | exponent | ratio to one after the other |"
    yield "| --- | --- | --- | ---: | --- |"
    for found in stage["rows"].values():
        for name, row in found["series"].items():
            sizes, steps = ", ".join(map(str, row["sizes"])), ", ".join(f"{1000 * s:.1f}" for s in row["seconds"])
            ratios = ", ".join(f"{r:.2f}" for r in row.get("ratio to one after the other", []))
            yield f"| {name} | {sizes} | {steps} | {row['exponent']:.2f} | {ratios} |"


def tests(_: str, stage: dict[str, Any]) -> Iterator[str]:
    for found in stage["rows"].values():
        failed, skipped = found.get("failed", {}), found.get("skipped", {})
        yield f"{found.get('passed', 0)} tests passed, {len(failed)} failed, {len(skipped)} were skipped."
        yield from (f"- failed: `{name}`: {why}" for name, why in failed.items())


def machine(_: str, stage: dict[str, Any]) -> Iterator[str]:
    for found in stage["rows"].values():
        yield "; ".join(f"{name}: {value:.0f}" for name, value in found.items() if "/s" in name) + "."


KINDS: dict[str, Callable[[str, dict[str, Any]], Iterator[str]]] = {
    "memory": memory, "caches": caches, "scaling": scaling, "tests": tests, "machine": machine,
}  # fmt: skip
