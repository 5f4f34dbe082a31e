"""Say what a training would cost before it runs: memory by part, operations, time on a GPU.

    ldm plan --base configs/sd-inject-dreambooth/attn2o-ffni.yaml --base_precision bf16 --gpu "RTX 3060"

One training step of the real model runs on fake tensors: nothing is loaded, and pictures need not be there. With --gpu
or --memory it says whether the training fits, and if not, which switches make it fit.
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser
from ldm.train.options import add_short, add_training, sorted_out


def add_arguments(p: Parser) -> None:
    add_training(p)
    add_short(p)
    what = p.add_argument_group("what to plan")
    what.add_argument("--base_precision", choices=("fp32", "bf16", "fp16"),
                      help="of the frozen UNet (default: what the config says, else fp32)")  # fmt: skip
    what.add_argument("--cache", metavar="memory|off|DIR",
                      help="off: pictures and captions are encoded in every step (default: as the config)")  # fmt: skip
    what.add_argument("--gpu", metavar="NAME", help="a GPU by name, such as 'RTX 4090' or A100")
    what.add_argument("--memory", type=float, metavar="GIB", help="memory of the device in GiB, instead of --gpu")
    what.add_argument("--json", action="store_true", help="print the numbers for machines")


def run(options: argparse.Namespace) -> None:
    from ldm.train import plan

    ours, trainer_options, overrides = sorted_out(options)
    print(plan.report(ours, trainer_options, overrides))
