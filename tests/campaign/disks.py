"""Full and read-only disks, disks out of file names, and a limit on the size of files, under every program that
writes. Root mounts small disks that only the attacked process sees; without root, file sizes are limited."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.campaign.attacks import REFUSED, SURVIVED, Attack, Failed, Family, judged, nothing_left
from tests.campaign.forked import forked
from tests.campaign.kills import whole_pictures
from tests.campaign.world import STEPS, World, copied, loads

NEW_NAMESPACE, READ_ONLY, REMOUNT, PRIVATE, RECURSIVE = 0x20000, 1, 32, 1 << 18, 1 << 14  # of Linux
KiB = 1024


def mount(folder: Path, options: str) -> None:
    """Put a disk of its own over a folder, which this process and its children alone see."""
    libc = ctypes.CDLL(None, use_errno=True)
    calls = (
        lambda: libc.unshare(NEW_NAMESPACE),
        lambda: libc.mount(b"none", b"/", None, PRIVATE | RECURSIVE, None),
        lambda: libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options.encode()),
    )
    for call in calls:
        if call():
            raise OSError(ctypes.get_errno(), "cannot mount a disk", str(folder))


def read_only(folder: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, os.fsencode(folder), None, REMOUNT | READ_ONLY, None):
        raise OSError(ctypes.get_errno(), "cannot make a disk read-only", str(folder))


def can_mount() -> bool:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return not forked(lambda: mount(Path(folder), "size=64k")).code


# --- programs and what they write to the disk ------------------------------------------------------------------------


def training(world: World, disk: Path) -> Callable[[], None]:
    return world.train(disk, "--max_steps", STEPS)


def resuming(world: World, disk: Path) -> Callable[[], None]:
    return world.resume(disk / "logs" / world.half.name, "--max_steps", STEPS)


def caching(world: World, disk: Path) -> Callable[[], None]:
    return world.train(disk.parent / "elsewhere", "--max_steps", 1, "--cache", disk / "cache")


def class_pictures(world: World, disk: Path) -> Callable[[], None]:
    more = ["--reg_data_root", disk / "class", "--num_class_images", 3, "--class_scale", 1, "--max_steps", 1]
    return world.train(disk.parent / "elsewhere", *more)


def sampling(world: World, disk: Path) -> Callable[[], None]:
    return world.sample(disk / "out", "--n_samples", 2)


PROGRAMS = {
    "a training": (training, 400),
    "a resumed training": (resuming, 400),
    "a training with a cache": (caching, 200),
    "a training that draws class pictures": (class_pictures, 60),
    "sample.py": (sampling, 40),
}  # and how much each writes, in KiB


def attack(world: World, random: Random, number: int, work: Path) -> Attack:
    """The programs in turn, each with another kind and size of disk."""
    name = list(PROGRAMS)[number % len(PROGRAMS)]
    make, usual = PROGRAMS[name]
    kind = random.choice(("full", "full", "full", "no names", "read-only")) if mounts() else "limit"
    size = random.randrange(0, usual, 4)
    names = random.randrange(2, 16)
    disk = work / "disk"
    disk.mkdir()

    def prepare() -> None:
        if kind == "limit":
            sys.dont_write_bytecode = True  # Python would leave half of what it compiles, and not find out
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * KiB, size * KiB))
            return
        held = 300 if name == "a resumed training" else 0
        mount(disk, f"size={(size + 4 + held) * KiB},nr_inodes={names + 24 if kind == 'no names' else 1000}")
        if held:
            copied(world.half, disk)
        if kind == "read-only":
            read_only(disk)

    def within() -> None:
        prepare()
        outcome = forked(make(world, disk), work)
        verdict = judged(outcome)
        if verdict == REFUSED and str(disk) not in outcome.line and disk.name not in outcome.line:
            raise Failed(f"the line does not name what could not be written: {outcome.line[:300]}")
        after(world, disk)
        if kind != "read-only":
            nothing_left(disk)
        print(verdict)

    def act() -> str:
        if kind == "limit" and name == "a resumed training":
            copied(world.half, disk)
        outcome = forked(within, work)
        if judged(outcome) == REFUSED:
            raise Failed(outcome.line)
        return outcome.line if outcome.line in (REFUSED, SURVIVED) else SURVIVED

    told = {"limit": f"files of at most {size} KiB", "full": f"a disk of {size} KiB", "no names": "a disk of few files"}
    return Attack(f"{name} on {told.get(kind, 'a read-only disk')}", act)


def after(world: World, disk: Path) -> None:
    """What has its own name is whole."""
    for run in (disk / "logs").glob("*"):
        loads(run, world.whole)
    whole_pictures(disk)


_mounts: list[bool] = []


def mounts() -> bool:
    """Whether this user may mount disks, asked once."""
    if not _mounts:
        _mounts.append(os.geteuid() == 0 and can_mount())
    return _mounts[0]


def needs(world: World) -> None:
    world.whole, world.half, mounts()  # noqa: B018 (made before processes are forked)


FAMILY = Family("disks", attack, "full and read-only disks", all=80, few=3, needs=needs)
