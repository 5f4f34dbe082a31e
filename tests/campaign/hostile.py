"""Hostile files, each read by the function that it is meant for and by a program that takes such files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.campaign.attacks import REFUSED, Attack, Failed, Family, bounded, judged
from tests.campaign.forked import GiB, forked, program
from tests.campaign.hostile_files import generate
from tests.campaign.read_hostile_files import READERS
from tests.campaign.world import World

# Of the kinds of files, those that programs take as they are.
PROGRAMS = ("object", "folder", "describe")


def cases(world: World) -> list:
    """All hostile files, written once for every seed."""
    if not hasattr(world, "hostile"):
        world.hostile = generate(world.folder / "hostile", world.seed)
    return world.hostile


def attack(world: World, random: Random, number: int, work: Path) -> Attack:
    """Every file once by its reader, then once more by a program."""
    all_of_them = cases(world)
    programs = [case for case in all_of_them if case.kind in PROGRAMS]
    number %= len(all_of_them) + len(programs)
    direct = number < len(all_of_them)
    case = all_of_them[number] if direct else programs[number - len(all_of_them)]
    how = f"read as {case.kind}" if direct else random.choice(list(TAKERS))

    def act() -> str:
        outcome = forked(reading(case) if direct else TAKERS[how](world, case.path, work), work, 40)
        verdict = judged(outcome)
        if (work / "ran").exists():
            raise Failed("it ran a command")
        if "weights_only=False" in outcome.text:
            raise Failed(f"the refusal advises to run the file's code: {outcome.line[:300]}")
        bounded(outcome, 20, GiB + GiB // 4)
        if direct and verdict == REFUSED and not (case.expectation and re.search(case.expectation, outcome.line)):
            raise Failed(f"expected {case.expectation or 'that it is read'}: {outcome.line[:300]}")
        if direct and verdict != REFUSED and case.expectation not in (None, ".*"):
            raise Failed("it was read")
        return verdict

    return Attack(f"{case.path.name}; {how}", act)


def reading(case) -> Callable[[], None]:
    def read() -> None:
        from ldm.cli import run_command

        run_command(lambda _: READERS[case.kind](case.path) and None)

    return read


TAKERS = {
    "inspect_adapter.py": lambda world, path, work: program("scripts/inspect_adapter.py", path),
    "sample.py --adapter_path": lambda world, path, work: world.sample(work / "out", "--adapter_path", path),
    "sample.py --ckpt": lambda world, path, work: world.sample(work / "out", "--ckpt", path),
    "sample.py --embedding_path": lambda world, path, work: world.sample(work / "out", "--embedding_path", path),
    "sample.py --from-file": lambda world, path, work: world.sample(work / "out", "--from-file", path),
    "main_dream_booth.py --actual_resume": lambda world, path, work: program(
        "main_dream_booth.py", *world.words(work, "--actual_resume", path)
    ),
}


def needs(world: World) -> None:
    cases(world)


def number_of(world: World) -> int:
    return len(cases(world)) + sum(case.kind in PROGRAMS for case in cases(world))


FAMILY = Family("hostile", attack, "hostile files", all=number_of, few=6, needs=needs)
