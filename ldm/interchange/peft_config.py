"""PEFT's configuration of a LoRA: the scale of each layer, and whether the factors belong to a changed base.

PEFT's `save_pretrained` writes it beside the weights, diffusers into the metadata of its file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import InputError, short
from ldm.files import parse_json, read_json
from ldm.interchange.formats import Opened
from ldm.patterns import Patterns

# Files of PEFT's `save_pretrained`, beside `CONFIG`.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"
# Values of `init_lora_weights` that leave the base as it is: the product of the initial factors is zero.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
# Those that take the product out of the base; a value may go on, as `pissa_niter_16` does.
CHANGED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def configurations(opened: Opened) -> dict[str, dict[str, Any]]:
    """PEFT's configurations by the prefix of the layers that they are for.

    PEFT writes one beside its file, for all layers; diffusers writes them into the metadata, e.g. `unet.lora_alpha`.
    Raises `InputError` for a damaged one.
    """
    file = opened.path
    beside = file.with_name(CONFIG)
    if file.name in WEIGHTS and beside.is_file():
        try:
            return {"": read_json(beside)}
        except InputError as error:
            raise InputError(f"{file}: PEFT's configuration is damaged: {error}") from None
    found: dict[str, dict[str, Any]] = {}
    written = parse_json(opened.metadata.get("lora_adapter_metadata", "{}"), f"{file}: lora_adapter_metadata")
    for key, value in written.items():
        part, dot, name = key.partition(".")
        found.setdefault(part + dot, {})[name] = value
    return found


def of_layer(name: str, configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, Mapping[str, Any]]:
    """The prefix and the configuration for a layer; empty if there is none."""
    return next(((part, config) for part, config in configs.items() if name.startswith(part)), ("", {}))


def scale(name: str, rank: int, configs: Mapping[str, Mapping[str, Any]], patterns: Patterns) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732), as PEFT has it for a layer."""
    part, config = of_layer(name, configs)
    alphas = (config.get("alpha_pattern") or {}).items()
    own = (alpha for key, alpha in alphas if patterns.fullmatch(rf"(.*\.)?({key})", name.removeprefix(part)))
    alpha = finite_alpha(next(own, config.get("lora_alpha", rank)), name, patterns.source)
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def finite_alpha(alpha: Any, layer: str, source: str | Path) -> float:
    """An alpha as a number. Raises `InputError` for anything else."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InputError(f"{source}: alpha of {short(layer)} must be a finite number, got {short(alpha)}")
    return float(alpha)


def refuse_changed_start(config: Mapping[str, Any], opened: Opened) -> None:
    """Raises `InputError` for factors that belong to a changed base and are no plain LoRA, such as DoRA with PiSSA."""
    start = config.get("init_lora_weights")
    if not is_plain(start):
        raise InputError(
            f"{opened.given} was trained with init_lora_weights {short(start)}, so it belongs to a changed base, which "
            "only plain LoRA can be taken out of; let PEFT merge it into the model and load that"
        )


def is_plain(start: Any) -> bool:
    """Whether this value of `init_lora_weights` leaves the base as it is."""
    return any(start is plain or (isinstance(plain, str) and start == plain) for plain in PLAIN_STARTS)


def start_of(config: Mapping[str, Any], opened: Opened) -> Path | None:
    """The folder with the initial factors of a LoRA whose training began with another base; None for a plain LoRA.

    PiSSA (arXiv 2404.02948), OLoRA (2406.01775), CorDA (2406.05223), LoftQ (2310.08659) and LoRA-GA (2407.05000) take
    scale * up_0 @ down_0 out of the base, so the change of the released base is that of the factors less it. Raises
    `InputError` where the initial factors are absent.
    """
    start = config.get("init_lora_weights")
    if is_plain(start):
        return None
    kind = next((kind for kind in CHANGED_STARTS if str(start).lower().startswith(kind)), None)
    if kind is None:
        known = ", ".join(map(str, PLAIN_STARTS[1:] + CHANGED_STARTS))
        raise InputError(f"{opened.given}: init_lora_weights is {short(start)}; expected one of {known}")
    around = opened.path.parent
    places = [around / f"{kind}_init", around.parent / f"{kind}_init"]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise InputError(
            f"{opened.given} was trained with init_lora_weights {start!r}, so it belongs to a changed base: put the "
            f"adapter as it was before training into {places[0]}, or save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    return found


def saves(opened: Opened, key: str) -> bool:
    """Whether a key is of a module that PEFT trained whole (`modules_to_save`)."""
    if ".modules_to_save." in key:
        return True
    names = [name for config in configurations(opened).values() for name in config.get("modules_to_save") or ()]
    return any(f".{name}." in f".{key}" for name in names if isinstance(name, str))
