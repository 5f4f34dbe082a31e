"""What each means costs and saves alone: one training step of Stable Diffusion v1 size, against all of them off.

    python benchmarks/switches.py [--size 256] [--switches "channels last" compiled]

The step is that of benchmarks/train_step.py (adapters attn2o-ffni, random weights, fp32 unless said). Each row runs in
a process of its own, so that the memory is its own: what the step needs beyond the model's weights, on a GPU as PyTorch
counts it, on a CPU as the process grows (compiling included).
"""

from __future__ import annotations

import functools
import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from common import can_compute, parser, table, timed
from train_step import ours, step_of

from ldm.modules.adapter_files import half_base
from ldm.modules.diffusionmodules.convolution import Conv2d
from ldm.train.compiled import compile_module


def library_convolutions(unet: torch.nn.Module) -> None:
    """No convolution is a matrix product: torch's own code for all of them, in this process."""
    Conv2d.forward = torch.nn.Conv2d.forward


# name: (checkpointing, what is done to the UNet, options of the optimizer)
SWITCHES: dict[str, tuple[bool | str, Callable[[torch.nn.Module], Any], dict]] = {
    "all off": (False, lambda unet: None, {}),
    "library convolutions": (False, library_convolutions, {}),
    "channels last": (False, lambda unet: unet.to(memory_format=torch.channels_last), {}),
    "compiled": (False, compile_module, {}),
    "frozen base in bf16": (False, functools.partial(half_base, dtype=torch.bfloat16), {}),
    "fused AdamW": (False, lambda unet: None, {"fused": True}),
    "checkpointing": (True, lambda unet: None, {}),
    "selective checkpointing": ("selective", lambda unet: None, {}),
}


def measure(name: str, size: int, repeats: int, threads: int) -> tuple[list[float], float]:
    """Seconds of each step, and GB that the step needs beyond what is there before it."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checkpointing, prepare, options = SWITCHES[name]
    made = ours(device, checkpointing)
    prepare(made[0])
    step = step_of(made, device, size, autocast=False, **options)
    before = memory(device)
    return timed(step, repeats, device), memory(device) - before


def memory(device: torch.device) -> float:
    """The most that was ever in use, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
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
    chosen = [name for name in options.switches or fast if "bf16" not in name or can_compute("bf16")]
    rows, needed = {}, {}
    for name in dict.fromkeys(["all off", *chosen]):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            measured = process.submit(measure, name, options.size, options.repeats, options.threads)
            rows[name], needed[name] = measured.result()
    table(rows, peer="all off", as_json=options.json, more={"GB": needed})


if __name__ == "__main__":
    main()
