"""Mutated configs: one change to a shipped config, read by the program that it is for."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.campaign.attacks import REFUSED, Attack, Failed, Family, judged, no_run
from tests.campaign.forked import forked, program
from tests.campaign.world import World
from tests.conftest import ROOT
from tests.runs import TINY

LAID_OVER = {"captioned", "photographs", "8gb", "12gb", "24gb", "80gb"}  # files that are no config by themselves
CONFIGS = [
    path for path in sorted((ROOT / "configs").rglob("*.yaml"))
    if path.stem not in LAID_OVER or "defaults:" in path.read_text(encoding="utf-8")
]  # fmt: skip
Path_ = tuple[str | int, ...]

# Mappings whose keys users choose: no key there can be misspelt.
FREE = {("lightning", "callbacks")}

# A training set for the published configs that leave it to their users.
DATA = ("target=ldm.train.datamodule.DataModuleFromConfig", "params.batch_size=1",
        "params.train.target=ldm.data.dreambooth.PersonalizedBase")  # fmt: skip

VALUES = {
    "a list": [1, "two"], "an empty list": [], "a mapping": {"a": 1}, "an empty mapping": {}, "a word": "naught",
    "an empty word": "", "a long word": "x" * 5000, "nothing": None, "true": True, "zero": 0, "a negative number": -7,
    "a huge number": 10**30, "a fraction": 0.3, "nan": float("nan"), "infinity": float("inf"),
    "a number as a word": "12", "a reference to nothing": "${nowhere.at.all}", "a reference to itself": "${model}",
    "bytes": b"\xff\x00", "a lone surrogate": "\ud800", "a folder": "/", "a dotted name": "os.system",
}  # fmt: skip


@cache
def resolved(path: Path) -> str:
    """A shipped config with its defaults, as JSON; with the sizes of the tiny model where it can be trained here."""
    from omegaconf import OmegaConf

    from ldm.config import load_config

    config = load_config(path)
    if program_of(OmegaConf.to_container(config)) != "scripts/train.py":
        small = [OmegaConf.load(file) for file in (ROOT / "configs" / "sd-mini" / "model.yaml", TINY)]
        for own in small:
            own.pop("defaults")
            own.pop("data", None)
        quick = {"lightning": {"trainer": {"max_steps": 1}}} if "lightning" in config else {}
        config = OmegaConf.merge(config, *small, quick)
        if "lightning" not in config or "trainer" not in OmegaConf.load(path).get("lightning", {}):
            config.pop("lightning", None) if "data" not in config else None
        for dataset in ("train", "train2", "reg", "validation"):
            if OmegaConf.select(config, f"data.params.{dataset}.params.size") is not None:
                config.data.params[dataset].params.size = 32
        if OmegaConf.select(config, "data.params.train.params.captions") is not None:
            config.data.params.train.params.captions = "filename"
    return json.dumps(OmegaConf.to_container(config))


def train_set(config: dict) -> Any:
    """What a config says of its training set; an empty mapping where it leaves that to its users."""
    return ((config.get("data") or {}).get("params") or {}).get("train") or {}


def program_of(config: dict) -> str:
    """The program that a shipped config is for."""
    train = train_set(config)
    if isinstance(train, dict) and str(train.get("target", "")).startswith("ldm.data."):
        is_subject = any(word in train["target"] for word in ("custom", "dreambooth", "personalized", "folder"))
        return "main_dream_booth.py" if is_subject else "scripts/train.py"
    text_encoder = (config.get("model", {}).get("params") or {}).get("cond_stage_config")
    return "sample.py" if "FrozenCLIP" in str(text_encoder) and "data" not in config else "scripts/train.py"


def places(value: Any, at: Path_ = ()) -> Iterator[Path_]:
    """The paths of all values in nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*at, key)
        yield from places(inner, (*at, key))


def parent(config: dict, at: Path_) -> Any:
    for key in at[:-1]:
        config = config[key]
    return config


def renamed(mapping: dict, old: str, new: str) -> None:
    """Give a key another name at its place."""
    items = [(new if key == old else key, value) for key, value in mapping.items()]
    mapping.clear()
    mapping.update(items)


# --- mutations: each changes a config at a place and says how, and whether it must be refused ------------------------


def swap_letters(config: dict, at: Path_, random: Random) -> tuple[str, bool]:
    key = at[-1]
    pairs = [i for i in range(len(key) - 1) if key[i] != key[i + 1]]
    i = random.choice(pairs)
    new = key[:i] + key[i + 1] + key[i] + key[i + 2 :]
    renamed(parent(config, at), key, new)
    return f"{dotted(at)} misspelt {new}", at[:-1] not in FREE


def drop(config: dict, at: Path_, random: Random) -> tuple[str, bool]:
    del parent(config, at)[at[-1]]
    return f"{dotted(at)} left out", False


def drop_letter(config: dict, at: Path_, random: Random) -> tuple[str, bool]:
    key = at[-1]
    i = random.randrange(len(key))
    new = key[:i] + key[i + 1 :]
    if not new or new in parent(config, at):
        new = key + key[-1]
    renamed(parent(config, at), key, new)
    return f"{dotted(at)} misspelt {new}", at[:-1] not in FREE


def twice(config: dict, at: Path_, random: Random) -> tuple[str, bool]:
    mapping = parent(config, at)
    mapping[f"{at[-1]}{TWICE}"] = mapping[at[-1]]
    return f"{dotted(at)} twice", True


def retype(config: dict, at: Path_, random: Random) -> tuple[str, bool]:
    name = random.choice(sorted(VALUES))
    parent(config, at)[at[-1]] = copy.deepcopy(VALUES[name])
    return f"{dotted(at)} is {name}", False


def wrap(config: dict, at: Path_, random: Random) -> tuple[str, bool]:
    mapping = parent(config, at)
    as_list = random.random() < 0.5
    mapping[at[-1]] = [mapping[at[-1]]] if as_list else {at[-1]: mapping[at[-1]]}
    return f"{dotted(at)} within a {'list' if as_list else 'mapping'}", False


def bury(config: dict, at: Path_, random: Random) -> tuple[str, bool]:
    value: Any = "deep"
    depth = random.choice((50, 200, 3000))
    for _ in range(depth):
        value = [value]
    parent(config, at)[at[-1]] = value
    return f"{dotted(at)} is {depth} nested lists", False


def move_up(config: dict, at: Path_, random: Random) -> tuple[str, bool]:
    upper = parent(config, at[:-1]) if len(at) > 1 else config
    value = parent(config, at).pop(at[-1])
    if isinstance(upper, dict):
        upper[at[-1]] = value
    return f"{dotted(at)} one level higher", False


def foreign(config: dict, at: Path_, random: Random) -> tuple[str, bool]:
    parent(config, at)["bysitting"] = random.choice((1, "word", {"a": 1}))
    return f"{dotted((*at[:-1], 'bysitting'))} added", at[:-1] not in FREE


TWICE = "__twice"
MUTATIONS = (swap_letters, swap_letters, drop_letter, drop, twice, retype, retype, retype, wrap, bury, move_up, foreign)
OF_KEYS = (swap_letters, drop_letter, twice, move_up, foreign, drop)


def dotted(at: Path_) -> str:
    return ".".join(map(str, at))


def text(config: dict) -> str:
    """A config as YAML."""
    dumper = type("Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda self, data: True})
    return yaml.dump(config, Dumper=dumper, sort_keys=False, allow_unicode=False).replace(TWICE, "")


def attack(world: World, random: Random, number: int, work: Path) -> Attack:
    """Every shipped config in turn; without -t, and every third time with it."""
    path = CONFIGS[number % len(CONFIGS)]
    config = json.loads(resolved(path))
    name = program_of(config)
    mutate = random.choice(MUTATIONS)
    some = [at for at in places(config) if mutate not in OF_KEYS or (isinstance(at[-1], str) and len(set(at[-1])) > 1)]
    at = random.choice(some)
    how, refuse = mutate(config, at, random)
    trains = name == "main_dream_booth.py" and random.random() < 0.4
    what = f"{path.relative_to(ROOT)}: {how}; {name}{' -t' if trains else ''}"

    try:
        content = text(config)
    except RecursionError:
        content = nested(config, at)
    (work / "config.yaml").write_text(content, errors="surrogatepass")

    def act() -> str:
        outcome = forked(run(world, work, name, trains, path), work, 60)
        verdict = judged(outcome)
        if verdict == REFUSED:
            no_run(work / "logs")
            if refuse and not any(word.lower() in outcome.line.lower() for word in told(at, how)):
                raise Failed(f"refused for something else: {outcome.line[:300]}")
        elif refuse:
            raise Failed(f"the key was ignored: {outcome.line[:300]}")
        elif trains and not list((work / "logs").glob("*/checkpoints/*")):
            raise Failed(f"exit code 0, but nothing was learnt: {outcome.line[:300]}")
        return verdict

    return Attack(what, act)


def told(at: Path_, how: str) -> tuple[str, ...]:
    """Words of which a refusal names one: the right key, the wrong one, or that there are two."""
    return (str(at[-1]), how.split()[-1], "bysitting", "duplicate")


def nested(config: dict, at: Path_) -> str:
    """A config as YAML whose value at a place is nested too deeply for the library that writes it."""
    depth, value = 0, parent(config, at)[at[-1]]
    while isinstance(value, list):
        depth, value = depth + 1, value[0]
    parent(config, at)[at[-1]] = "NESTED"
    return text(config).replace("NESTED", "[" * depth + "deep" + "]" * depth)


def run(world: World, work: Path, name: str, trains: bool, path: Path):
    """The program on the mutated config."""
    file = work / "config.yaml"
    if name == "sample.py":
        return world.sample(work / "out", config=file)
    if name == "scripts/train.py":
        pictures = f"data.params.train.params.data_root={world.folder / 'photos'}"
        has_pictures = train_set(json.loads(resolved(path)))
        own = [] if has_pictures else [f"data.{word}" for word in DATA] + [pictures]
        return program(name, "--base", file, "--logdir", work / "logs", *own)
    words = world.words(work, *(["-t"] if trains else []), config=file)
    if "custom-diffusion" in str(path):
        roots = {"--data_root": "--datapath", "--reg_data_root": "--reg_datapath"}
        words = [roots.get(word, word) for word in words] + ["--caption", "dog", "--reg_caption", "dog"]
        words[words.index("--class_word") : words.index("--class_word") + 2] = []
        if "token" in path.stem or "face" in path.stem or "style" in path.stem or "joint" in path.stem:
            words += ["--modifier_token", "<new1>"]
    return program(name, *words)


FAMILY = Family("configs", attack, "mutated configs", all=400, few=5)
