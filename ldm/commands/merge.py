"""Scale a position adapter, sum several of the same routes, or stack them side by side.

    ldm merge a/500-adapters b/500-adapters --weights 0.7 0.3 --out both
    ldm merge a/500-adapters b/500-adapters --stack --out both

A sum is exact and one adapter for each route, whose mid_dim is the sum of theirs; stacking needs no equal routes.
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser
from ldm.errors import InputError


def add_arguments(p: Parser) -> None:
    p.add_argument("folders", nargs="+", metavar="DIR", help="adapter folders; of one, --weights scales it")
    p.add_argument("--weights", nargs="+", type=float, help="one for each folder (default 1)")
    p.add_argument("--stack", action="store_true", help="side by side instead of summed")
    p.add_argument("--out", required=True, metavar="DIR")
    p.add_argument("--force", action="store_true", help="overwrite what exists")


def run(options: argparse.Namespace) -> None:
    from ldm.interchange import position
    from ldm.interchange.command import to_be_written

    weights = options.weights or [1.0] * len(options.folders)
    if len(weights) != len(options.folders):
        raise InputError(f"{len(weights)} --weights for {len(options.folders)} folders; expected one for each")
    output = to_be_written(options.out, options.force)
    folders = [position.read(path) for path in options.folders]
    if len(folders) == 1:
        merged = position.scaled(folders[0], weights[0])
    else:
        merged = (position.stacked if options.stack else position.summed)(folders, weights)
    position.write(output, merged)
    parts = (f"{e['din']}-{e['dout']}, mid_dim {e['mid_dim']}, scale {e['scale']:g}" for e in merged[0]["adapters"])
    print(f"{output}  {'; '.join(parts)}")
