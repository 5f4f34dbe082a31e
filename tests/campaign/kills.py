"""Kills at every write: the process dies at the n-th file opened, renamed, flushed or removed.

What lies on the disk afterwards is the old state or the new one, loads, and goes on as if nothing had happened.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

from tests.campaign.attacks import REFUSED, SURVIVED, Attack, Failed, Family, judged
from tests.campaign.forked import forked
from tests.campaign.world import STEPS, World, copied, loads, only_run, same_end
from tests.runs import pixels

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Python tells these, with the path first, before it does them; `ctypes.dlsym` is how two folders are exchanged.
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink")


class Point:
    """Counts the changes below a folder in this process and calls `reached(number, kind)` before each."""

    def __init__(self, folder: Path, reached: Callable[[int, str], None]) -> None:
        self.folder, self.reached, self.count = str(folder.resolve()), reached, 0
        self.files: dict[int, str] = {}
        sys.addaudithook(self._audit)
        self._fsync, os.fsync = os.fsync, self._flushed

    def _inside(self, path: object) -> bool:
        try:
            return os.path.abspath(os.fsdecode(path)).startswith(self.folder)  # type: ignore[arg-type]
        except TypeError:
            return False  # a number of an open file

    def _audit(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(flags, int) and flags & WRITES and self._inside(path):
                self._next("open")
        elif event in CHANGES and (self._inside(args[0]) or len(args) > 1 and self._inside(args[1])):
            self._next(event)
        elif event == "ctypes.dlsym" and args[1] == "renameat2":
            self._next("exchange")

    def _flushed(self, file: int) -> None:
        """Before a file is flushed its content may be on the disk, or half of it."""
        path = os.readlink(f"/proc/self/fd/{file}")
        if path.startswith(self.folder) and os.path.isfile(path):
            self._next(f"half of {path}")
        if path.startswith(self.folder):
            self._next("fsync")
        self._fsync(file)

    def _next(self, kind: str) -> None:
        self.count += 1
        self.reached(self.count, kind)


def killed_at(act: Callable[[], None], folder: Path, number: int) -> Callable[[], None]:
    """`act`, killed at its change of that number below `folder`."""

    def reached(count: int, kind: str) -> None:
        if count != number:
            return  # also for the change that is made here
        if kind.startswith("half of "):
            path = kind.removeprefix("half of ")
            os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def killed() -> None:
        Point(folder, reached)
        act()

    return killed


def changes(act: Callable[[], None], folder: Path) -> int:
    """How many changes `act` makes below `folder`."""
    kinds = folder / "changes"

    def counted() -> None:
        point = Point(folder, lambda *_: None)
        try:
            act()
        finally:
            count, point.folder = point.count, "/nowhere"
            print(f"\nchanges {count}", flush=True)

    folder.mkdir(exist_ok=True)
    outcome = forked(counted, folder)
    kinds.unlink(missing_ok=True)
    return int(outcome.line.split()[1])


# --- programs that write, each with what must hold after a kill ------------------------------------------------------


def training(world: World, work: Path) -> Callable[[], None]:
    return world.train(work, "--max_steps", STEPS)


def after_training(world: World, work: Path) -> str:
    runs = list((work / "logs").glob("*")) if (work / "logs").is_dir() else []
    if not runs:
        return SURVIVED
    run = only_run(work)
    step = loads(run, world.whole)
    end = judged(forked(world.resume(run, "--max_steps", STEPS), work))
    if step is None:
        if end != REFUSED:
            raise Failed("resumed without last.ckpt")
        return SURVIVED
    if end == REFUSED and step < STEPS:
        raise Failed(f"killed after step {step}, and does not go on")
    same_end(run, world.whole, STEPS)
    if left := list((run / "checkpoints").glob(".*.tmp-*")):
        if step < STEPS:
            raise Failed(f"{left[0].name} was left after a resume")
    return SURVIVED


def resuming(world: World, work: Path) -> Callable[[], None]:
    run = work / "logs" / world.half.name
    if not run.exists():
        copied(world.half, work)
    return world.resume(run, "--max_steps", STEPS)


def caching(world: World, work: Path) -> Callable[[], None]:
    return world.train(work, "--max_steps", STEPS, "--cache", work / "cache")


def after_caching(world: World, work: Path) -> str:
    """The cache that the killed run left serves another run, or is made again."""
    for run in (work / "logs").glob("*") if (work / "logs").is_dir() else []:
        loads(run, world.whole)
        run.rename(work / "killed")
    judged_zero(forked(caching(world, work), work))
    same_end(only_run(work), world.whole, STEPS)
    return SURVIVED


def sampling(world: World, work: Path) -> Callable[[], None]:
    return world.sample(work / "out", "--n_samples", 2)


def after_sampling(world: World, work: Path) -> str:
    """Every picture that is there is whole, and another call adds its own."""
    before = whole_pictures(work / "out")
    judged_zero(forked(sampling(world, work), work))
    if whole_pictures(work / "out") - before < 3:
        raise Failed("a later call wrote over pictures of the killed one")
    return SURVIVED


def class_pictures(world: World, work: Path) -> Callable[[], None]:
    more = ["--reg_data_root", work / "class", "--num_class_images", 3, "--class_scale", 1, "--max_steps", 1]
    return world.train(work, *more, "model.params.num_timesteps_cond=1")


def after_class_pictures(world: World, work: Path) -> str:
    whole_pictures(work / "class")
    for run in (work / "logs").glob("*") if (work / "logs").is_dir() else []:
        run.rename(work / "killed")
    judged_zero(forked(class_pictures(world, work), work))
    if whole_pictures(work / "class") != 3:
        raise Failed("the class folder was not filled up to 3 pictures")
    return SURVIVED



def whole_pictures(folder: Path) -> int:
    """How many pictures there are; raises `Failed` for one that cannot be read."""
    pictures = [path for path in folder.rglob("*.png") if not path.name.startswith(".")] if folder.is_dir() else []
    pictures = [path for path in pictures if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    for path in pictures:
        try:
            pixels(path)
        except OSError as error:
            raise Failed(f"half-written: {path.name}: {error}") from None
    return len(pictures)


def judged_zero(outcome) -> None:
    if judged(outcome) == REFUSED:
        raise Failed(f"the same command is refused afterwards: {outcome.line[:300]}")


PROGRAMS = {
    "a training": (training, after_training),
    "a resumed training": (resuming, after_training),
    "a training that fills a cache": (caching, after_caching),
    "sample.py": (sampling, after_sampling),
    "a training that draws class pictures": (class_pictures, after_class_pictures),
}


@cache
def points(world: World) -> list[tuple[str, int]]:
    """All points at which a program can be killed."""
    found = []
    for name, (act, _) in PROGRAMS.items():
        folder = world.folder / f"dry-{name.replace(' ', '-')}"
        found += [(name, number) for number in range(1, changes(act(world, folder), folder) + 1)]
    return found


def attack(world: World, random: Random, number: int, work: Path) -> Attack:
    """Every point of every program, in an order that begins with some of each."""
    all_of_them = points(world)
    order = Random(0).sample(range(len(all_of_them)), len(all_of_them))
    name, point = all_of_them[order[number % len(order)]]
    act, after = PROGRAMS[name]

    def kill() -> str:
        outcome = forked(killed_at(act(world, work), work, point), work)
        if outcome.code != -signal.SIGKILL:
            judged_zero(outcome)  # some writes depend on the clock: it came to its end
        return after(world, work)

    return Attack(f"{name} killed at change {point} on the disk", kill)


def needs(world: World) -> None:
    world.whole, world.half, points(world)  # noqa: B018 (made before processes are forked)


FAMILY = Family("kills", attack, "kills at every write", all=lambda world: len(points(world)), few=3, needs=needs)
