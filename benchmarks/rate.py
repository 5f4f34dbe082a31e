"""How fast a training step of the small model computes, against matrix products and against diffusers with peft.

    python benchmarks/rate.py                   # with one thread and with all of them

A step is that of `benchmarks/scaling.py` with eight pictures: the UNet forward and back with everything frozen but an
adapter. The products are of two square matrices of 2048 numbers a side, which is about the most that the machine gives.
The peer is a UNet of diffusers of the same widths with a LoRA of rank 4.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from common import machine, parser, timed
from scaling import step_of
from sweep import peer_step
from torch.utils.flop_counter import FlopCounterMode

BATCH, SIDE = 8, 2048


def product() -> Callable[[], object]:
    a = torch.randn(SIDE, SIDE)
    return lambda: a @ a


WORKS = {
    "product of two matrices": product,
    "diffusers + peft": lambda: peer_step(BATCH),
    "ours": lambda: step_of(batch=BATCH),
}


def main() -> None:
    options = parser(__doc__).parse_args()
    print(machine())
    print("| threads | work | GFLOP | ms | min - max | GFLOP/s | of the product's |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for threads in sorted({1, options.threads}):
        torch.set_num_threads(threads)
        best = 0.0
        for name, make in WORKS.items():
            work = make()
            with FlopCounterMode(display=False) as counted:
                work()
            seconds = timed(work, 4 * options.repeats, warm_up=2)
            operations = counted.get_total_flops() / 1e9
            rate = operations / statistics.median(seconds)
            best = best or rate
            spread = f"{1000 * min(seconds):.0f} - {1000 * max(seconds):.0f}"
            cells = [f"{operations:.1f}", f"{1000 * statistics.median(seconds):.0f}", spread]
            cells += [f"{rate:.0f}", f"{rate / best:.2f}"]
            print(f"| {threads} | {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
