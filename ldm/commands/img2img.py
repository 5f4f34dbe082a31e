"""Draw pictures that begin at another one, as the published program of Stable Diffusion does.

    ldm img2img --prompt "A fantasy landscape" --init-img sketch.jpg --strength 0.8

It is `ldm sample` with the published defaults; every option of that works here too.
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser
from ldm.commands import sample
from ldm.errors import InputError

DEFAULTS = {
    "n_samples": 2, "n_iter": 1, "scale": [5.0], "strength": 0.75, "outdir": "outputs/img2img-samples",
    "safety_checker": None, "watermark": None,  # as published, where they are there
}  # fmt: skip


def add_arguments(p: Parser) -> None:
    sample.add_arguments(p)
    p.set_defaults(**DEFAULTS)


def run(options: argparse.Namespace) -> None:
    if not options.init_img:
        raise InputError("--init-img is missing: name the picture to begin at")
    sample.run(options)
