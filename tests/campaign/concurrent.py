"""Programs beside each other: two that go on with one run, folders read while they are written, names taken twice."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path
from random import Random

from tests.campaign.attacks import REFUSED, SURVIVED, Attack, Failed, Family, judged
from tests.campaign.forked import Process, forked
from tests.campaign.kills import whole_pictures
from tests.campaign.world import STEPS, World, copied, same_end


def two_resumes(world: World, random: Random, work: Path) -> str:
    """The second is refused, whenever it comes; the first ends where it would have alone."""
    run = copied(world.half, work)
    first = Process(world.resume(run, "--max_steps", STEPS), work)
    time.sleep(random.choice((0, random.uniform(0, 1.5))))
    second = Process(world.resume(run, "--max_steps", STEPS), work)
    outcomes = [first.wait(), second.wait()]
    verdicts = [judged(outcome) for outcome in outcomes]
    if verdicts.count(SURVIVED) == 2 and not any("nothing to do" in outcome.text for outcome in outcomes):
        raise Failed("both went on with the same run at the same time")
    if SURVIVED not in verdicts:
        raise Failed(f"both were refused: {outcomes[0].line[:200]}")
    same_end(run, world.whole, STEPS)
    return SURVIVED


def resume_after_a_kill(world: World, random: Random, work: Path) -> str:
    """A dead process holds no lock."""
    run = copied(world.half, work)
    first = Process(world.resume(run, "--max_steps", STEPS), work)
    time.sleep(random.uniform(0.1, 2.0))
    first.send(signal.SIGKILL)
    first.wait()
    outcome = forked(world.resume(run, "--max_steps", STEPS), work)
    if judged(outcome) == REFUSED and "finished" not in outcome.line and str(STEPS) not in outcome.line:
        raise Failed(f"a run whose process is dead does not go on: {outcome.line[:300]}")
    same_end(run, world.whole, STEPS)
    return SURVIVED


def resume_of_a_running_one(world: World, random: Random, work: Path) -> str:
    """A run that is being trained is not to be gone on with."""
    first = Process(world.train(work, "--max_steps", STEPS, *SAVES), work)
    for _ in range(2000):
        if found := list((work / "logs").glob("*/checkpoints/last.ckpt")):
            break
        time.sleep(0.005)
    run = found[0].parent.parent
    second = forked(world.resume(run, "--max_steps", STEPS), work)
    judged(first.wait())
    if judged(second) == SURVIVED and "finished" not in second.text:
        raise Failed("a run that another process was training was resumed")
    same_end(run, world.whole, STEPS)
    return SURVIVED


SAVES = ["lightning.modelcheckpoint.params.every_n_train_steps=1"]


def read_while_written(world: World, random: Random, work: Path) -> str:
    """A folder that is written again and again is read as one of its two states, or refused."""
    folder = work / "folder"
    one, other = (world.whole / "checkpoints" / f"{step}-adapters" for step in (STEPS // 2, STEPS))
    shutil.copytree(one, folder)

    def write() -> None:
        from ldm.modules import adapter_files

        states = [(dict(adapter_files.read_tensors(path)), adapter_files.read_config(path)) for path in (one, other)]
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for tensors, told in states:
                adapter_files.write(folder, tensors, told)

    def read() -> None:
        from safetensors.torch import load

        from ldm.errors import InputError
        from ldm.interchange import load_any

        states = [load((path / "adapters.safetensors").read_bytes()) for path in (one, other)]
        for _ in range(10):
            model = world.model
            try:
                load_any(model, folder)
            except InputError as error:
                if "does not exist" in str(error) or "neither" in str(error):
                    raise Failed(f"the folder was gone while it was written: {error}") from None
                continue
            held = model.state_dict()
            mine = [all(held[f"model.diffusion_model.{n}"].equal(v) for n, v in state.items()) for state in states]
            if not any(mine):
                raise Failed("what was read is a mixture of two states of the folder")

    writer = Process(write, work)
    try:
        return judged(forked(read, work))
    finally:
        writer.send(signal.SIGKILL)
        writer.wait()


def two_runs_of_one_name(world: World, random: Random, work: Path) -> str:
    """Two runs that begin in the same second have folders of their own."""
    both = [Process(world.train(work, "--max_steps", 4), work) for _ in range(2)]
    for process in both:
        judged(process.wait())
    runs = list((work / "logs").glob("*"))
    if len(runs) != 2:
        raise Failed(f"two runs made {len(runs)} folders")
    for run in runs:
        same_end(run, world.whole, 4)
    return SURVIVED


def two_samples(world: World, random: Random, work: Path) -> str:
    """Two programs that draw into one folder lose no picture."""
    both = [Process(world.sample(work / "out", "--n_samples", 2, "--seed", seed), work) for seed in (1, 100)]
    for process in both:
        judged(process.wait())
    if (number := whole_pictures(work / "out")) != 6:
        raise Failed(f"two programs drew 4 pictures and 2 grids into one folder, {number} are there")
    return SURVIVED


def two_with_one_cache(world: World, random: Random, work: Path) -> str:
    """Two runs may fill one cache at the same time."""
    places = [work / "one", work / "two"]
    both = [Process(world.train(place, "--max_steps", 4, "--cache", work / "cache"), work) for place in places]
    for process, place in zip(both, places, strict=True):
        judged(process.wait())
        (run,) = (place / "logs").glob("*")
        same_end(run, world.whole, 4)
    return SURVIVED


def two_that_draw_class_pictures(world: World, random: Random, work: Path) -> str:
    """Two runs may fill one folder of class pictures at the same time."""
    more = ["--reg_data_root", work / "class", "--num_class_images", 3, "--class_scale", 1, "--max_steps", 1]
    both = [Process(world.train(work / name, *more), work) for name in ("one", "two")]
    for process in both:
        judged(process.wait())
    if (number := whole_pictures(work / "class")) != 3:
        raise Failed(f"asked for 3 class pictures, {number} are there")
    return SURVIVED


MEETINGS = (
    two_resumes, resume_after_a_kill, resume_of_a_running_one, read_while_written, two_runs_of_one_name, two_samples,
    two_with_one_cache, two_that_draw_class_pictures,
)  # fmt: skip


def attack(world: World, random: Random, number: int, work: Path) -> Attack:
    meeting = MEETINGS[number % len(MEETINGS)]
    return Attack(meeting.__name__.replace("_", " "), lambda: meeting(world, random, work))


def needs(world: World) -> None:
    world.whole, world.half, world.model  # noqa: B018 (made before processes are forked)


FAMILY = Family("concurrent", attack, "concurrent runs", all=40, few=len(MEETINGS), needs=needs)
