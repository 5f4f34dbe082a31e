"""What a sweep varies, by short names. A word and its value become options of `ldm train` and changes of the config."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.config import find_file, load_config, parse_overrides, plain, unet_params
from ldm.errors import InputError, did_you_mean, short
from ldm.models.building import untuned_model
from ldm.modules.adapters import BLOCK_KINDS
from ldm.tuning.search import chosen_routes

ADAPTERS = "adapter_config"  # among the parameters of the UNet


@dataclass(frozen=True)
class Word:
    """A row: what a word means and, unless a function of its own treats it, the arguments that a value becomes."""

    help: str
    arguments: Callable[[Any], Sequence[str]] | None = None


def _override(dotted: str) -> Callable[[Any], Sequence[str]]:
    return lambda value: [f"{dotted}={json.dumps(value)}"]


WORDS = {
    "route": Word("<reads>-<writes> of the position adapters, or all"),
    "family": Word("a config in place of --base: a YAML file, or the name of one beside it"),
    "seed": Word("seed of the training", lambda value: ["--seed", str(value)]),
    "subject": Word("folder of photographs; with * several", lambda value: ["--data_root", str(value)]),
    "class_word": Word("what the subject is", lambda value: ["--class_word", str(value)]),
    "lr": Word("learning rate", _override("model.base_learning_rate")),
    "steps": Word("length of the training", lambda value: ["--max_steps", str(value)]),
    "loss": Word("l1 or l2", _override("model.params.loss_type")),
    "mid_dim": Word("width of the position adapters"),
    "scale": Word("factor of what the position adapters add"),
    "method": Word("activation of the position adapters"),
    "form": Word("what computes the position adapters"),
}
OF_ADAPTERS = ("route", "mid_dim", "scale", "method", "form")


def check_word(name: str) -> None:
    """Raises `InputError` for a name that is neither a word nor a dotted key of a config."""
    if name not in WORDS and "." not in name:
        raise InputError(
            f"{name!r} cannot be varied{did_you_mean(name, WORDS)} A key of the config is written with its dots."
        )


def values_of(text: str) -> list[Any]:
    """`a,b` as values: cut at commas outside of brackets and quotes, each read as a value of a config is.

    Raises `InputError` where there is none, or an empty one.
    """
    pieces = re.findall(r"""(?:[^,\[{("']|\[[^\]]*\]|\{[^}]*\}|\([^)]*\)|"[^"]*"|'[^']*')+""", text)
    if not text or ",".join(pieces) != text:
        raise InputError(f"cannot read the values {text!r}: expected them with commas between, such as 1,2,3")
    return [plain(parse_overrides([f"value={piece}"]).value) for piece in pieces]


def spread(name: str, values: Iterable[Any], base: str) -> list[Any]:
    """The values of a word with `route=all` and patterns of folders replaced by what they stand for."""
    spread_out: list[Any] = []
    for value in values:
        if name == "route" and value == "all":
            spread_out += routes_of(base)
        elif name == "subject" and isinstance(value, str) and glob.has_magic(value):
            found = sorted(path for path in glob.glob(str(find_file(value))) if Path(path).is_dir())
            if not found:
                raise InputError(f"subject={value}: there is no such folder")
            spread_out += found
        else:
            spread_out.append(value)
    if len({json.dumps(value) for value in spread_out}) != len(spread_out):
        raise InputError(f"{name} has a value twice: {short(spread_out)}")
    return spread_out


@cache
def base_config(path: str) -> DictConfig:
    return load_config(find_file(path))


@cache
def routes_of(path: str) -> dict[str, str]:
    """The routes that the model of a config has, with the kind of their blocks."""
    with torch.device("meta"):
        return chosen_routes(untuned_model(base_config(path)).model.diffusion_model, "all")


def base_of(settings: Mapping[str, Any], base: str) -> str:
    """The config that a trial starts from: `base`, or that of its family. Raises `InputError` for an unknown one."""
    family = settings.get("family")
    if family is None:
        return base
    folder = Path(base).parent
    path = str(family) if str(family).endswith((".yaml", ".yml")) else str(folder / f"{family}.yaml")
    if not find_file(path).is_file():
        known = [one.stem for one in find_file(folder).glob("*.yaml")]
        raise InputError(f"family={family}: there is no {path}{did_you_mean(family, known)}")
    return path


def arguments_of(settings: Mapping[str, Any], base: str) -> list[str]:
    """What a trial of these settings adds to the command line of `ldm train`. Raises `InputError`."""
    words = []
    for name, value in settings.items():
        row = WORDS.get(name)
        if row is None:
            words.append(f"{name}={json.dumps(value)}")
        elif row.arguments is not None:
            words += row.arguments(value)
    if of_adapters := {name: settings[name] for name in OF_ADAPTERS if name in settings}:
        place = f"{unet_params(base_config(base))}.{ADAPTERS}"
        words.append(f"{place}={json.dumps(adapter_config(of_adapters, base))}")
    return words


def adapter_config(settings: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The adapters of a config with another route, width, scale, activation or form.

    Where the config is one of a folder of routes, such as `configs/sd-mini`, and its file is named after its route, the
    entry of another route is the one in the file of that name: published widths differ between kinds of blocks.
    Raises `InputError` for a config without adapters, or with several where the route varies.
    """
    own = adapters_in(base_config(base))
    if not own:
        raise InputError(f"{', '.join(settings)}: {base} has no position adapters; name a --base that has some")
    if route := settings.get("route"):
        known = routes_of(base)
        if route not in known:
            raise InputError(f"route={route}: no block has it{did_you_mean(route, known)}")
        if len(own) > 1:
            raise InputError(f"route={route}: {base} has {len(own)} adapters; name a --base that has one")
        beside = Path(base).with_name(f"{route}.yaml")
        if Path(base).stem in known and find_file(beside).is_file():
            own = adapters_in(base_config(str(beside)))
        else:
            reads, writes = route.split("-")
            own = [(known[route], {**own[0][1], "din": reads, "dout": writes})]
    others = {name: value for name, value in settings.items() if name != "route"}
    config: dict[str, Any] = dict.fromkeys(BLOCK_KINDS)
    for kind, entry in own:
        config[kind] = [*(config[kind] or []), {**entry, **others}]
    return config


def adapters_in(config: DictConfig | Mapping) -> list[tuple[str, dict[str, Any]]]:
    """The position adapters of a config: the kind of block and the entry of each."""
    whole = OmegaConf.create(plain(config))
    found = plain(OmegaConf.select(whole, f"{unet_params(whole)}.{ADAPTERS}")) or {}
    entries = {kind: own if isinstance(own, list) else [own] for kind, own in found.items() if own}
    return [(kind, entry) for kind, own in entries.items() for entry in own]
