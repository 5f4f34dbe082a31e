"""Damaged run folders under `-r`: a run is refused, or ends where the undamaged one does, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from tests.campaign import configs
from tests.campaign.adapter_folders import append, flip, remove, replace, truncate
from tests.campaign.attacks import REFUSED, Attack, Failed, Family, bounded, judged
from tests.campaign.forked import GiB, forked
from tests.campaign.world import STEPS, World, copied, same_end


def checkpoint(change: Callable[[dict, Random], str]) -> Callable[[Path, Random], tuple[str, bool]]:
    """A change of what `last.ckpt` holds, which is then written again as a proper file."""

    def changed(run: Path, random: Random) -> tuple[str, bool]:
        path = run / "checkpoints" / "last.ckpt"
        held = torch.load(path, weights_only=True)
        how = change(held, random)
        torch.save(held, path)
        return f"last.ckpt: {how}", False

    return changed


def tensors_of(held: dict, random: Random) -> dict[str, torch.Tensor]:
    """The weights, or what the optimizer keeps of one of them."""
    if random.random() < 0.5:
        return held["state_dict"]
    return random.choice(list(held["optimizer_states"][0]["state"].values()))


def section_removed(held: dict, random: Random) -> str:
    name = random.choice(sorted(held))
    del held[name]
    return f"without {name}"


def section_emptied(held: dict, random: Random) -> str:
    name = random.choice(sorted(held))
    held[name] = random.choice(({}, [], None, 0, "word"))
    return f"{name} is {held[name]!r}"


def tensor_removed(held: dict, random: Random) -> str:
    tensors = tensors_of(held, random)
    name = random.choice(sorted(tensors))
    del tensors[name]
    return f"without the tensor {name}"


def tensor_added(held: dict, random: Random) -> str:
    held["state_dict"]["model.diffusion_model.extra"] = torch.zeros(3)
    return "with one tensor more"


def tensor_changed(held: dict, random: Random) -> str:
    tensors = tensors_of(held, random)
    name = random.choice([name for name, value in tensors.items() if isinstance(value, torch.Tensor) and value.dim()])
    how = random.choice(("nan", "shape", "type", "value"))
    value = tensors[name].clone()
    if how == "nan":
        value.view(-1)[0] = float("nan")
    elif how == "value":
        value.view(-1)[0] += 1
    tensors[name] = {"shape": value.reshape(-1)[:-1], "type": value.half()}.get(how, value)
    return f"another {how} of the tensor {name}"


def state_changed(held: dict, random: Random) -> str:
    """One of the plain values, anywhere: counters of the loop, states of random numbers, of the data, of callbacks."""
    rest = {name: value for name, value in held.items() if name not in ("state_dict", "optimizer_states")}
    at = random.choice([at for at in places(rest) if not isinstance(value_at(rest, at), torch.Tensor)])
    kinds = [name for name in sorted(configs.VALUES)]
    how = random.choice(("left out", *kinds))
    try:
        if how == "left out":
            del parent(held, at)[at[-1]]
        else:
            parent(held, at)[at[-1]] = copy.deepcopy(configs.VALUES[how])
    except TypeError:  # within a tuple, which stays as it is
        del held["random_states"]
        return "without random_states"
    return f"{configs.dotted(at)} is {how}"


def places(value: Any, at: tuple = ()) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for number, (key, inner) in enumerate(items):
        if number > 20:
            return  # one of the numbers of a state is like another
        yield (*at, key)
        yield from places(inner, (*at, key))


def parent(held: Any, at: tuple) -> Any:
    for key in at[:-1]:
        held = held[key]
    return held


def value_at(held: Any, at: tuple) -> Any:
    return parent(held, at)[at[-1]]


def config(run: Path, random: Random) -> tuple[str, bool]:
    """The run's own config with a key misspelt or a target of someone else."""
    path = run / "configs" / "project.yaml"
    held = yaml.safe_load(path.read_text())
    mutate = random.choice((configs.swap_letters, configs.foreign, configs.bury, foreign_target))
    of_keys = [at for at in configs.places(held) if isinstance(at[-1], str) and len(set(at[-1])) > 1]
    at = random.choice(of_keys)
    how, refuse = mutate(held, at, random)
    try:
        path.write_text(configs.text(held))
    except RecursionError:
        path.write_text(configs.nested(held, at))
    return f"project.yaml: {how}", refuse


def foreign_target(held: dict, at: tuple, random: Random) -> tuple[str, bool]:
    targets = [at for at in configs.places(held) if at[-1] == "target"]
    at = random.choice(targets)
    parent(held, at)["target"] = random.choice(("evil.Family", "os.system", "builtins.exec", "unittest.__main__.x"))
    return f"{configs.dotted(at)} is {parent(held, at)['target']}", True


def file(damage: Callable[[Path, Random], tuple[str, bool]]) -> Callable[[Path, Random], tuple[str, bool]]:
    """A change of the bytes of `last.ckpt`."""

    def changed(run: Path, random: Random) -> tuple[str, bool]:
        alone = run / "alone"
        alone.mkdir()
        (run / "checkpoints" / "last.ckpt").rename(alone / "last.ckpt")
        how, _ = damage(alone, random)
        for path in alone.iterdir():
            path.rename(run / "checkpoints" / path.name)
        alone.rmdir()
        return how, False  # bytes that nothing reads may be others: what counts is where it ends

    return changed


DAMAGES = (
    *map(file, (flip, flip, flip, truncate, append, remove, replace)),
    *map(checkpoint, (section_removed, section_emptied, tensor_removed, tensor_added, tensor_changed, tensor_changed)),
    *map(checkpoint, (state_changed, state_changed, state_changed)), config, config, config,
)  # fmt: skip


def attack(world: World, random: Random, number: int, work: Path) -> Attack:
    """A copy of the half-way run, damaged in one place and resumed."""
    run = copied(world.half, work)
    how, refuse = DAMAGES[number % len(DAMAGES)](run, random)
    (work / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}

    def act() -> str:
        outcome = forked(world.resume(run, "--max_steps", STEPS), work, 90)
        if (work / "ran").exists():
            raise Failed("code beside the folder ran")
        verdict = judged(outcome)
        bounded(outcome, 60, 2 * GiB)
        if verdict == REFUSED:
            if lost := [path for path, content in before.items() if not path.exists() or path.read_bytes() != content]:
                raise Failed(f"refused, but {lost[0].name} has changed")
            return verdict
        if refuse:
            raise Failed("the damage went unnoticed")
        same_end(run, world.whole, STEPS)
        return verdict

    return Attack(f"a run resumed; {how}", act)


def needs(world: World) -> None:
    world.whole, world.half  # noqa: B018 (made before processes are forked)


FAMILY = Family("runs", attack, "damaged run folders", all=200, few=5, needs=needs)
