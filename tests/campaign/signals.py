"""Signals at random times: what a run had learnt is saved or the run says that nothing was; it goes on to the bit."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from random import Random

from tests.campaign.attacks import REFUSED, SURVIVED, Attack, Failed, Family, judged, nothing_left
from tests.campaign.forked import Process, forked
from tests.campaign.world import LONG, World, loads, same_end

TERM, INT, USR1, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP
SENT = {
    "SIGTERM": [TERM], "SIGINT": [INT], "SIGINT twice": [INT, INT], "SIGUSR1": [USR1], "SIGHUP": [HUP],
    "SIGUSR1 and SIGTERM": [USR1, TERM], "SIGTERM twice": [TERM, TERM], "SIGTERM and SIGINT": [TERM, INT],
}  # fmt: skip
KILLS = (HUP,)  # nobody promises that a run outlives these


def attack(world: World, random: Random, number: int, work: Path) -> Attack:
    """The signals in turn, each at another time between the start of a run and its end."""
    name = list(SENT)[number % len(SENT)]
    start = random.choice((random.uniform(0.05, 1.0), random.uniform(0.5, 4.0)))
    pause = random.choice((0.0, 0.02, random.uniform(0, 0.5)))
    every = random.choice((1, 7, 10**6))

    def act() -> str:
        more = [f"lightning.modelcheckpoint.params.every_n_train_steps={every}"]
        process = Process(world.train(work, "--max_steps", LONG, *more), work)
        for wait, number in zip((start, pause), SENT[name], strict=False):
            time.sleep(wait)
            process.send(number)
        outcome = process.wait(120)
        runs = list((work / "logs").glob("*")) if (work / "logs").is_dir() else []
        signals = tuple(int(number) for number in SENT[name])
        judged(outcome, signals)
        if -outcome.code in set(signals) - set(KILLS) and (INT not in signals) and runs:
            raise Failed(f"{name} killed it without a word after {start:.2f} s; its last line: {outcome.line[:200]}")
        if not runs:
            return REFUSED  # stopped before anything was begun
        (run,) = runs
        step = loads(run, world.steps)
        stopped = "stopped by" in outcome.text
        if step is None:
            if stopped and "nothing" not in outcome.text:
                raise Failed(f"it says that it was stopped at a step, but nothing was saved: {outcome.line[:200]}")
            return SURVIVED
        if outcome.code >= 0:
            nothing_left(run / "checkpoints")
        goes_on(world, run, step, work)
        return SURVIVED

    return Attack(f"{name} after {start:.2f} s, {pause:.2f} s apart, a run that saves every {every} steps", act)


def goes_on(world: World, run: Path, step: int, work: Path) -> None:
    """Resume for two steps more, which must be those of the run that nobody stopped."""
    if step >= LONG:
        return
    end = min(step + 2, LONG)
    outcome = forked(world.resume(run, "--max_steps", end), work)
    if judged(outcome) == REFUSED:
        raise Failed(f"saved at step {step}, but does not go on: {outcome.line[:300]}")
    same_end(run, world.steps, end)


def needs(world: World) -> None:
    world.steps  # noqa: B018 (made before processes are forked)


FAMILY = Family("signals", attack, "signals at random times", all=64, few=2, needs=needs)
