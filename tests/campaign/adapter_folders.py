"""Damaged folders of what was tuned: bytes, JSON and tensors changed, then read by the programs that take folders."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from tests.campaign.attacks import REFUSED, Attack, Failed, Family, bounded, judged
from tests.campaign.configs import VALUES, parent, places, renamed
from tests.campaign.forked import GiB, forked, program
from tests.campaign.world import TUNED, World


def weights_of(folder: Path, random: Random) -> Path:
    return random.choice(sorted(folder.glob("*.safetensors")))


# --- what is done to a folder: each returns what it did, and whether the folder must be refused ----------------------


def flip(folder: Path, random: Random) -> tuple[str, bool]:
    path = random.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    where = random.randrange(min(len(content), random.choice((8, 400, len(content)))))
    content[where] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    return f"a bit flipped in byte {where} of {path.name}", False


def truncate(folder: Path, random: Random) -> tuple[str, bool]:
    path = random.choice(sorted(folder.iterdir()))
    size = path.stat().st_size
    kept = random.choice((0, 1, 7, 8, 9, random.randrange(size - 2)))
    path.write_bytes(path.read_bytes()[:kept])
    return f"{path.name} cut to {kept} of {size} bytes", True


def append(folder: Path, random: Random) -> tuple[str, bool]:
    path = random.choice(sorted(folder.iterdir()))
    path.write_bytes(path.read_bytes() + random.randbytes(random.choice((1, 64, 5000))))
    return f"bytes after the end of {path.name}", True


def remove(folder: Path, random: Random) -> tuple[str, bool]:
    path = random.choice(sorted(folder.iterdir()))
    path.unlink()
    return f"{path.name} removed", True


def replace(folder: Path, random: Random) -> tuple[str, bool]:
    path = random.choice(sorted(folder.iterdir()))
    path.unlink()
    kind = random.choice(("a folder", "a link to nothing", "a link to itself", "a device", "random bytes"))
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to nothing":
        path.symlink_to("nothing")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(random.randbytes(3000))
    return f"{path.name} is {kind}", True


def tensors(change: Callable[[dict, Random], tuple[str, bool]]) -> Callable[[Path, Random], tuple[str, bool]]:
    """A change of the tensors of a file, which is written again as a proper one, half the time with a true digest."""

    def changed(folder: Path, random: Random) -> tuple[str, bool]:
        from safetensors.torch import load, save_file

        path = weights_of(folder, random)
        held = load(path.read_bytes())
        how, refuse = change(held, random)
        save_file(held, path)
        if random.random() < 0.5:
            digest(folder, path, len(held))
            how += ", with a true digest"
        return f"{path.name}: {how}", refuse

    return changed


def digest(folder: Path, path: Path, count: int | None = None) -> None:
    """Tell the digest of a changed file in the JSON, as someone who means harm would."""
    json_path = folder / "adapter_config.json"
    told = json.loads(json_path.read_text())
    told["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if count is not None:
        told["files"][path.name]["tensors"] = count
    json_path.write_text(json.dumps(told))


def without(held: dict, random: Random) -> tuple[str, bool]:
    name = random.choice(sorted(held))
    del held[name]
    return f"{name} removed", True


def with_more(held: dict, random: Random) -> tuple[str, bool]:
    name = random.choice(("extra", "model.diffusion_model.out.2.bias", "cond_stage_model.logit_scale", sorted(held)[0]))
    held[f"{name}.more" if name in held else name] = torch.zeros(4)
    return "a tensor added that nothing names", True


def misnamed(held: dict, random: Random) -> tuple[str, bool]:
    name = random.choice(sorted(held))
    held[name.replace(".", "_", 1) + "x"] = held.pop(name)
    return f"{name} has another name", True


def reshaped(held: dict, random: Random) -> tuple[str, bool]:
    name = random.choice(sorted(held))
    value = held[name]
    held[name] = random.choice((value.reshape(-1)[:-1].clone(), value[None].clone(), torch.zeros(0), torch.zeros(())))
    return f"{name} is of shape {list(held[name].shape)} in place of {list(value.shape)}", True


def not_finite(held: dict, random: Random) -> tuple[str, bool]:
    name = random.choice(sorted(held))
    value = held[name].clone()
    value.view(-1)[random.randrange(value.numel())] = random.choice((float("nan"), float("inf"), float("-inf")))
    held[name] = value
    return f"{name} holds a number that is not finite", True


def other_type(held: dict, random: Random) -> tuple[str, bool]:
    name = random.choice(sorted(held))
    kind = random.choice((torch.float16, torch.float64, torch.bool, torch.uint8))
    held[name] = held[name].to(kind)
    return f"{name} is of type {kind}", not kind.is_floating_point


def header(folder: Path, random: Random) -> tuple[str, bool]:
    """What the header of a safetensors file says of its tensors, changed by itself."""
    path = weights_of(folder, random)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    told, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = random.choice([key for key in told if key != "__metadata__"])
    how = random.choice(("shape", "offsets", "length", "metadata"))
    if how == "shape":
        told[name]["shape"] = random.choice(([10**9, 10**9], [2**63], [-1], [0], "4", None, [1.5]))
    elif how == "offsets":
        told[name]["data_offsets"] = random.choice(([0, 10**15], [8, 0], [-4, 4], [0], None))
    elif how == "metadata":
        told["__metadata__"] = random.choice(({"a": 1}, [1], "x", {"alpha_pattern": "(a+)+$"}))
    text = json.dumps(told).encode()
    size = random.choice((0, 2**63, 2**40, len(text) + len(data) + 1)) if how == "length" else len(text)
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    digest(folder, path)
    return f"the header of {path.name} claims another {how}", how != "metadata"


def edited(folder: Path, random: Random) -> tuple[str, bool]:
    """One value of the JSON is another, or one key is."""
    path = folder / "adapter_config.json"
    told = json.loads(path.read_text())
    at = random.choice(list(places(told)))
    how = random.choice(("value", "value", "left out", "misspelt", "huge", "deep", "code"))
    if how == "left out":
        del parent(told, at)[at[-1]]
    elif how == "misspelt" and isinstance(at[-1], str):
        renamed(parent(told, at), at[-1], at[-1][1:] + at[-1][0])
    elif how == "huge":
        parent(told, at)[at[-1]] = random.choice((10**7, 3 * 10**6, 10**9, [1] * 100_000, ["x"] * 100_000))
    elif how == "code":
        parent(told, at)[at[-1]] = random.choice(("os.system", "evil.Family", "ctypes.cdll", "unittest.__main__.x"))
    elif how == "deep":
        parent(told, at)[at[-1]] = "DEEP"
    else:
        kinds = [name for name, value in VALUES.items() if not isinstance(value, bytes)]
        how = random.choice(kinds)
        parent(told, at)[at[-1]] = VALUES[how]
    path.write_text(json.dumps(told).replace('"DEEP"', "[" * 5000 + "]" * 5000))
    return f"adapter_config.json: {'.'.join(map(str, at))} {how}", False


DAMAGES = (
    flip, flip, truncate, append, remove, replace, header, header, edited, edited, edited, edited,
    *map(tensors, (without, with_more, misnamed, reshaped, not_finite, other_type)),
)  # fmt: skip


def attack(world: World, random: Random, number: int, work: Path) -> Attack:
    """The folders of all kinds in turn, read into a model, by `sample.py` or by `inspect_adapter.py`."""
    kind = list(TUNED)[number % len(TUNED)]
    reader = random.choice(("load", "load", "sample.py", "inspect_adapter.py"))
    folder = shutil.copytree(world.tuned(kind), work / "folder")
    how, refuse = random.choice(DAMAGES)(folder, random)
    (work / "evil.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")

    def act() -> str:
        outcome = forked(reading(world, reader, folder, work), work, 40)
        verdict = judged(outcome)
        if (work / "ran").exists():
            raise Failed("code beside the folder ran")
        bounded(outcome, 20, GiB + GiB // 4)
        if refuse and verdict != REFUSED and reader != "inspect_adapter.py":
            raise Failed("the damage went unnoticed")
        return verdict

    return Attack(f"a folder of {kind}: {how}; {reader}", act)


def reading(world: World, reader: str, folder: Path, work: Path) -> Callable[[], None]:
    """A program that reads the folder; `load` puts it into a model that is there already, and looks at what came."""
    if reader == "sample.py":
        return world.sample(work / "out", "--adapter_path", folder)
    if reader == "inspect_adapter.py":
        return program("scripts/inspect_adapter.py", folder)

    def load() -> None:
        from ldm.cli import run_command

        run_command(lambda _: loaded(world.model, folder))

    return load


def loaded(model, folder: Path) -> None:
    """Load a folder into a model, all of it or nothing; raises `Failed` where something was left out."""
    from safetensors.torch import load

    from ldm.errors import InputError
    from ldm.interchange import load_any

    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        load_any(model, folder)
    except InputError:
        after = model.state_dict()
        if changed := [name for name in before if name not in after or not torch.equal(before[name], after[name])]:
            raise Failed(f"refused, but {changed[0]} of the model has changed") from None
        raise
    state = model.state_dict()
    held = {name: value for path in folder.glob("*.safetensors") for name, value in load(path.read_bytes()).items()}
    for name, value in held.items():
        mine = state.get(name, state.get(f"model.diffusion_model.{name}"))
        if mine is None:
            raise Failed(f"{name} is in the folder, but did not come into the model")
        if not torch.equal(mine, value.to(mine.dtype)) and torch.isfinite(value).all():
            raise Failed(f"{name} is not in the model as the folder holds it")
    if bad := [name for name, value in state.items() if not torch.isfinite(value).all()]:
        raise Failed(f"{bad[0]} of the model is not finite")


def needs(world: World) -> None:
    world.model  # noqa: B018 (made before processes are forked)
    for kind in TUNED:
        world.tuned(kind)


FAMILY = Family("adapters", attack, "damaged adapter folders", all=400, few=8, needs=needs)
