"""Analyse the scores of a sweep by analysis of variance, with figures.

    ldm anova sweeps/first/results.parquet --metric clip_i --factors reads,writes --block subject

The last checkpoint of every finished trial counts. With --out the tables and figures are written to a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import Parser
from ldm.errors import InputError


def add_arguments(p: Parser) -> None:
    p.add_argument("results", metavar="RESULTS", help="results.parquet of a sweep, or a .csv")
    p.add_argument("--metric", default="clip_i", help="column of the score (default clip_i)")
    p.add_argument("--factors", default="reads,writes", metavar="A,B", help="one or two columns (default reads,writes)")
    p.add_argument("--block", default="subject", help="column of the blocks, or none (default subject)")
    p.add_argument("--where", action="append", default=[], metavar="COLUMN=VALUE",
                   help="only rows with this value (or one of several: family=position,lora)")  # fmt: skip
    p.add_argument("--power", action="store_true", help="the power of this and of larger designs, from these effects")
    p.add_argument("--out", metavar="DIR", help="also write anova.json, .csv, .tex, .md and figures there")


def run(options: argparse.Namespace) -> None:
    try:
        from ldm.study import analysis, figures
        from ldm.study.observations import last_of_each_trial, read_results, where
    except ImportError as error:
        raise InputError(f"ldm anova needs {error.name}: pip install 'position-adapters-ldm[study]'") from None

    wanted = dict(word.split("=", 1) if "=" in word else (word, "") for word in options.where)
    frame, notes = last_of_each_trial(read_results(options.results))
    frame = where(frame, wanted) if wanted else frame
    factors = [name.strip() for name in options.factors.split(",") if name.strip()]
    block = None if options.block == "none" else options.block
    found = analysis.analyse(frame, options.metric, factors, block, options.power)
    found.notes = notes + found.notes
    if options.out:
        folder = Path(options.out)
        analysis.write(found, folder)
        found.notes += figures.draw(analysis.Design(frame, options.metric, factors, block), folder)
    print(analysis.in_words(found))
    if options.out:
        print(f"\ntables and figures are in {options.out}")
