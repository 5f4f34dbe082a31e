"""What an attack is, and how the end of a program is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.forked import WRONG, Failed, Outcome

REFUSED, SURVIVED = "refused", "survived"


@dataclass
class Attack:
    """One attack: what it does, in words, and the act, which returns `REFUSED` or `SURVIVED` or raises `Failed`."""

    what: str
    act: Callable[[], str]


@dataclass
class Family:
    """A kind of attack.

    `attack(world, random, number, work)` prepares the one with that number in the new folder `work`, the same for the
    same seed.
    """

    name: str
    attack: Callable[..., Attack]
    title: str
    all: int | Callable[[Any], int]  # how many a whole campaign tries; a function of the world where that decides
    few: int  # how many the tests try
    needs: Callable[[Any], None] | None = None  # makes what the attacks share, before processes are forked for them


def judged(outcome: Outcome, signals: tuple[int, ...] = ()) -> str:
    """`SURVIVED` after exit code 0, `REFUSED` after one line and exit code 2; raises `Failed` for any other end.

    `signals` are those that may end the program.
    """
    if outcome.hung:
        raise Failed(f"hung: killed after {outcome.seconds:.0f} s; its last line: {outcome.line[-300:]}")
    if outcome.line.startswith(WRONG):
        raise Failed(outcome.line.removeprefix(WRONG))
    if "Traceback (most recent call last)" in outcome.text:
        raise Failed(f"a traceback, exit code {outcome.code}: {outcome.line[-300:]}")
    if outcome.code == 0:
        return SURVIVED
    if -outcome.code in signals or outcome.code - 128 in signals:
        return SURVIVED
    if outcome.code != 2:
        raise Failed(f"exit code {outcome.code}: {outcome.line[-300:]}")
    errors = [line for line in outcome.text.splitlines() if line.startswith("error: ")]
    if len(errors) != 1 or outcome.line != errors[0]:
        raise Failed(f"exit code 2, but the last line is not one that says what was wrong: {outcome.line[-300:]}")
    if len(errors[0]) > 2000:
        raise Failed(f"an error line of {len(errors[0])} characters: {errors[0][:200]}...")
    return REFUSED


def bounded(outcome: Outcome, seconds: float, memory: int) -> None:
    """Raises `Failed` for what took more time, or more memory beyond the start, than a file may cost."""
    if outcome.seconds > seconds:
        raise Failed(f"took {outcome.seconds:.1f} s, allowed {seconds:.0f}: {outcome.line[-300:]}")
    if outcome.memory > memory:
        raise Failed(f"took {outcome.memory / 2**30:.2f} GiB, allowed {memory / 2**30:.2f}: {outcome.line[-300:]}")


def nothing_left(folder: Path) -> None:
    """Raises `Failed` for hidden beginnings of files, which a program that ended by itself has removed."""
    left = [str(path.relative_to(folder)) for path in folder.rglob(".*.tmp-*")]
    if left:
        raise Failed(f"half-written files were left: {', '.join(left[:3])}")


def no_run(logs: Path) -> None:
    """Raises `Failed` for a run folder that a refused program left."""
    left = [path.name for path in logs.glob("*")] if logs.is_dir() else []
    if left:
        raise Failed(f"refused, but the folder {left[0]} was left in {logs.name}/")
