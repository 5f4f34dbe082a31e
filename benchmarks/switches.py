"""What each switch costs and saves by itself: one training step of Stable Diffusion v1 size, against all switches off.

    python benchmarks/switches.py [--size 256] [--switches "channels last" compiled]

The step is that of benchmarks/train_step.py (adapters attn2o-ffni, random weights, fp32 unless said). Each means takes
turns with a process in which all are off. Memory is what a step needs beyond the model's weights, on a GPU as PyTorch
counts it, on a CPU as the process grows (compiling included).
"""

from __future__ import annotations

import json
import resource
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import can_compute, in_turns, machine, parser
from train_step import keep_freed, ours, step_of

from ldm.devices import cast_frozen
from ldm.modules.convolution import Conv2d
from ldm.train.compiled import compile_module


def library_convolutions(unet: torch.nn.Module) -> None:
    """No convolution is a matrix product: torch's own code for all of them, in this process."""
    Conv2d.forward = torch.nn.Conv2d.forward


# name: what is told to `step_of`
SWITCHES: dict[str, dict[str, Any]] = {
    "freed memory kept": {"prepare": [keep_freed]},
    "library convolutions": {"prepare": [library_convolutions]},
    "channels last": {"prepare": [lambda unet: unet.to(memory_format=torch.channels_last)]},
    "compiled": {"prepare": [compile_module]},
    "frozen base in bf16": {"prepare": [partial(cast_frozen, dtype=torch.bfloat16)]},
    "fused AdamW": {"fused": True},
    "checkpointing": {"checkpointing": True},
    "selective checkpointing": {"checkpointing": "selective"},
}


def switched(name: str, size: int, device: torch.device) -> Callable[[], None]:
    return step_of(ours, size, device=device, **SWITCHES[name])


def memory() -> float:
    """The most that was ever in use, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", type=int, default=256, help="picture size in pixels")
    p.add_argument(
        "--switches",
        nargs="+",
        choices=list(SWITCHES),
        help="these alone (default: all, but on a CPU without compiling)",
    )
    options = p.parse_args()
    fast = [name for name in SWITCHES if name != "compiled" or torch.cuda.is_available()]  # minutes, on two cores
    rows = {}
    for name in options.switches or fast:
        if "bf16" in name and not can_compute("bf16", options.device):
            continue
        works = {
            "off": partial(step_of, ours, options.size, device=options.device),
            "on": partial(switched, name, options.size, options.device),
        }
        seconds, needed = in_turns(works, options.repeats, options.threads, memory)
        off, on = statistics.median(seconds["off"]), statistics.median(seconds["on"])
        rows[name] = {"off": off, "on": on, "ratio": on / off, "GB off": needed["off"], "GB on": needed["on"]}
    if options.json:
        print(json.dumps({"machine": machine(), "unit": "s", "rows": rows}))
        return
    print(machine())
    print("| switch | all off, s | on, s | ratio | GB off | GB on |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
