"""Draw pictures from prompts, as the published program of Stable Diffusion does.

    ldm txt2img --prompt "a photograph of an astronaut riding a horse" --plms

It is `ldm sample` with the published defaults; every option of that works here too.
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser
from ldm.commands import sample

DEFAULTS = {
    "n_samples": 3, "outdir": "outputs/txt2img-samples",
    "safety_checker": None, "watermark": None,  # as published, where they are there
}  # fmt: skip


def add_arguments(p: Parser) -> None:
    sample.add_arguments(p)
    p.set_defaults(**DEFAULTS)


def run(options: argparse.Namespace) -> None:
    sample.run(options)
