"""Attack the programs and print a table: tried, refused, survived, failed. Exit code 1 when anything failed.

    python -m tests.campaign                        # all of it: `make campaign`
    python -m tests.campaign --only kills signals   # some families
    python -m tests.campaign --seed 3 --only configs --case 17    # one attack again
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from tests.campaign.attacks import REFUSED, SURVIVED, Failed, Family
from tests.campaign.families import FAMILIES
from tests.campaign.world import World
from tests.conftest import ROOT

FAILED = "failed"
PAGE, BEGIN, END = ROOT / "docs" / "reliability.md", "<!-- campaign: begin -->", "<!-- campaign: end -->"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m tests.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [family.name for family in FAMILIES]
    p.add_argument("--only", nargs="+", choices=names, default=names, metavar="FAMILY", help=", ".join(names))
    p.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
    p.add_argument("--examples", type=int, help="attacks of each family (default: each family's own number)")
    p.add_argument("--few", action="store_true", help="a few attacks of each family, as the tests make them")
    p.add_argument("--case", type=int, help="only the attack with this number")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="attacks at the same time (default: one per CPU)")
    p.add_argument("--keep", type=Path, metavar="DIR", help="keep what the attacks wrote in this folder")
    p.add_argument("--verbose", action="store_true", help="a line for every attack, not only for those that failed")
    p.add_argument("--write-docs", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    return p


def attempt(world: World, family: Family, seed: int, number: int, folder: Path) -> tuple[str, str, str]:
    """Make one attack in a new folder: how it ended, what it was, and what was wrong, if anything."""
    work = folder / f"{family.name}-{number}"
    work.mkdir()
    what = f"{family.name} {number}"
    try:
        attack = family.attack(world, Random(f"{family.name}/{seed}/{number}"), number, work)
        what = attack.what
        return attack.act(), what, ""
    except Failed as failure:
        return FAILED, what, str(failure)
    except Exception as error:  # one attack that is wrong itself does not end the campaign, nor does it pass
        return FAILED, what, f"the campaign's own fault: {error!r}"


def size(family: Family, world: World) -> int:
    return family.all(world) if callable(family.all) else family.all


def command(seed: int, family: Family, number: int) -> str:
    return f"python -m tests.campaign --seed {seed} --only {family.name} --case {number}"


def table(rows: list[tuple[Family, dict[str, int], float]]) -> list[str]:
    """The counts as a Markdown table."""
    ends = (REFUSED, SURVIVED, FAILED)
    lines = ["| attack | tried | refused | survived | failed | seconds |", "| --- | --: | --: | --: | --: | --: |"]
    for family, counts, seconds in rows:
        numbers = [sum(counts.values()), *(counts[end] for end in ends)]
        lines.append(f"| {family.title} | {' | '.join(f'{n:,}' for n in numbers)} | {seconds:.0f} |")
    sums = [sum(counts[end] for _, counts, _ in rows) for end in ends]
    numbers = " | ".join(f"{n:,}" for n in (sum(sums), *sums))
    return [*lines, f"| together | {numbers} | {sum(seconds for *_, seconds in rows):.0f} |"]


def write_docs(lines: list[str], words: list[str]) -> None:
    """Replace what stands between the two marks in the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    block = [BEGIN, f"`{shlex.join(['python', '-m', 'tests.campaign', *words])}`:", "", *lines, END]
    PAGE.write_text(before + "\n".join(block) + after)


def main(words: list[str]) -> int:
    options = parser().parse_args(words)
    logging.disable(logging.NOTSET)
    with tempfile.TemporaryDirectory(prefix="campaign-", ignore_cleanup_errors=True) as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        world = World(folder / "world", options.seed)
        rows = [run(world, family, options, folder) for family in FAMILIES if family.name in options.only]
    lines = table(rows)
    print("\n" + "\n".join(lines))
    if options.write_docs:
        write_docs(lines, [word for word in words if word != "--write-docs"])
    return int(any(counts[FAILED] for _, counts, _ in rows))


def run(world: World, family: Family, options: argparse.Namespace, folder: Path) -> tuple[Family, dict, float]:
    """Make the attacks of a family, several at the same time; how many ended how, and the seconds that they took."""
    start, counts = time.monotonic(), {REFUSED: 0, SURVIVED: 0, FAILED: 0}
    if family.needs:
        family.needs(world)
    several = options.examples or (family.few if options.few else size(family, world))
    numbers = range(several) if options.case is None else [options.case]

    def one(number: int) -> tuple[int, str, str, str]:
        return number, *attempt(world, family, options.seed, number, folder)

    for number, end, what, wrong in side_by_side(one, numbers, options.jobs):
        counts[end] += 1
        if end == FAILED:
            lines = (f"FAILED  {what}", wrong, f"again: {command(options.seed, family, number)}")
            print("\n        ".join(lines), flush=True)
        elif options.verbose:
            print(f"{end:8}{family.name} {number}: {what}", flush=True)
    return family, counts, time.monotonic() - start


def side_by_side(one, numbers, jobs: int):
    """`map(one, numbers)` in forked processes, as results come."""
    if jobs == 1:
        yield from map(one, numbers)
        return
    global _one
    _one = one  # a forked process has it; it could not be sent
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(_call, numbers)


def _call(number: int):
    return _one(number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
