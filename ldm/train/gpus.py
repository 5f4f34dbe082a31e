"""GPUs by name, with the numbers of their data sheets."""

from __future__ import annotations

from typing import NamedTuple

from ldm.errors import InputError, did_you_mean


class Gpu(NamedTuple):
    """Memory in GiB; 10^12 dense operations a second in bf16 (T4: fp16) with fp32 sums; bandwidth in 10^9 bytes/s."""

    memory: float
    tera: float
    bandwidth: float


GPUS = {
    "T4": Gpu(16, 65, 320),
    "RTX 3060": Gpu(12, 25.6, 360),
    "RTX 3090": Gpu(24, 71, 936),
    "RTX 4060 Ti 16GB": Gpu(16, 44, 288),
    "RTX 4070": Gpu(12, 58, 504),
    "RTX 4080": Gpu(16, 97.5, 717),
    "RTX 4090": Gpu(24, 165, 1008),
    "RTX 5090": Gpu(32, 210, 1792),
    "L4": Gpu(24, 121, 300),
    "A10": Gpu(24, 125, 600),
    "A100": Gpu(80, 312, 2039),
    "H100": Gpu(80, 989, 3350),
    "H200": Gpu(141, 989, 4800),
}


def gpu(name: str) -> Gpu:
    """The GPU of that name. Raises `InputError` for an unknown one."""
    known = {one.lower(): value for one, value in GPUS.items()}
    if name.lower() not in known:
        raise InputError(f"no GPU {name!r} is known{did_you_mean(name, GPUS)}; known: {', '.join(GPUS)}")
    return known[name.lower()]


def seconds(calls: list[tuple[int, int]], on: Gpu, throughput: float = 1.0) -> float:
    """The time of kernels in a roofline model: the longer of computing and moving bytes, for each kernel.

    calls: (floating-point operations, bytes) of each kernel. throughput: the fraction of the peak rates in practice.
    """
    rates = on.tera * 1e12 * throughput, on.bandwidth * 1e9 * throughput
    return sum(max(flops / rates[0], traffic / rates[1]) for flops, traffic in calls)
