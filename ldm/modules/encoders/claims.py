"""Checks the `config.json` of a CLIP folder before transformers builds the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ldm.errors import InputError, did_you_mean, short
from ldm.files import TEXT_BYTES, read_json

# Upper limits. The largest known encoder, OpenCLIP's bigG, has 48 layers and a width of 1664.
LARGEST = {
    "vocab_size": 10**6,
    "hidden_size": 2**13,
    "intermediate_size": 2**15,
    "num_hidden_layers": 128,
    "num_attention_heads": 2**10,
    "max_position_embeddings": 2**16,
    "projection_dim": 2**13,
    "image_size": 2**12,
    "num_channels": 16,
    "patch_size": 2**12,
}
NUMBERS = (
    "layer_norm_eps", "attention_dropout", "initializer_range", "initializer_factor", "logit_scale_init_value",
)  # fmt: skip
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
TOWERS = ("text_config", "text_config_dict", "vision_config", "vision_config_dict")
ATTENTION = ("attn_implementation", "_attn_implementation")
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
PARAMETERS = 2**31


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any, most: int) -> bool:
    return _is_int(value) and 1 <= value <= most


def _is_number(value: Any) -> bool:
    return value is None or _is_int(value) and abs(value) < 2**63 or isinstance(value, float) and math.isfinite(value)


def _is_id(value: Any) -> bool:
    return value is None or _is_int(value) and 0 <= value < 2**31


# The keys of a tower that are read, with their checks and the names of these in messages.
KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{key: (partial(_is_size, most=most), f"a whole number from 1 to {most}") for key, most in LARGEST.items()},
    **dict.fromkeys(NUMBERS, (_is_number, "a finite number")),
    **dict.fromkeys(IDS, (_is_id, "a whole number of at least 0")),
}


def read_clip(folder: Path) -> dict[str, Any]:
    """The `config.json` of a CLIP folder, or of its text encoder alone: sizes, numbers and activations, nothing else.

    Other keys are not passed on, because transformers would fetch code for some of them. Raises `InputError` for values
    that ask for code, have a wrong type, or describe a network of absurd size.
    """
    file = folder / "config.json"
    config = read_json(file)
    if not isinstance(config, Mapping):
        raise InputError(f"{file} must be a mapping, got {short(config)}")
    towers = {name: _tower(config[name], file) for name in TOWERS if config.get(name) is not None}
    return _tower(config, file) | towers


def read_text_tower(folder: Path) -> dict[str, Any]:
    """The part of `read_clip` that is its text encoder."""
    config = read_clip(folder)
    return config.get("text_config") or {name: value for name, value in config.items() if name not in TOWERS}


def _tower(part: Any, file: Path) -> dict[str, Any]:
    """The known keys of a text or vision tower, with checked values."""
    if not isinstance(part, Mapping):
        raise InputError(f"{file}: expected a mapping in it, got {short(part)}")
    for key in ATTENTION:
        if "/" in str(part.get(key)):
            raise InputError(f"{file} refused: its {key} {short(part[key])} asks for code, and a folder is data")
    for key, (fits, expected) in KEYS.items():
        if key in part and not fits(part[key]):
            raise InputError(f"{file}: {key} must be {expected}, got {short(part[key])}")
    if "hidden_act" in part:
        _check_activation(part["hidden_act"], file)
    if _parameters(part) > PARAMETERS:
        raise InputError(f"{file} asks for more than {PARAMETERS} parameters")
    return {key: part[key] for key in (*KEYS, "hidden_act") if part.get(key) is not None}


def _parameters(part: Mapping[str, Any]) -> int:
    """The approximate number of parameters of a tower whose sizes have been checked."""
    width, inner = part.get("hidden_size", 0), part.get("intermediate_size", 0)
    layers = part.get("num_hidden_layers", 0) * (4 * width**2 + 2 * width * inner)
    return layers + (part.get("vocab_size", 0) + part.get("max_position_embeddings", 0)) * width


def _check_activation(name: Any, file: Path) -> None:
    from transformers.activations import ACT2FN

    if not isinstance(name, str) or name not in ACT2FN:
        known = did_you_mean(name, ACT2FN) if isinstance(name, str) else "; expected a name such as quick_gelu"
        raise InputError(f"{file}: hidden_act {short(name)} is unknown{known}")


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Within this context, errors of transformers become one line with the path of the folder."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # many types, from three libraries
        raise InputError(f"{folder} cannot be used as a text encoder: {' '.join(str(error).split())[:300]}") from error


def check_tokenizer(folder: Path) -> None:
    """Raises `InputError` for files of a tokenizer that are too large or nested too deeply."""
    for name in FILES:
        if (folder / name).is_file():
            read_json(folder / name)
    merges = folder / "merges.txt"
    if merges.is_file() and merges.stat().st_size > TEXT_BYTES:
        raise InputError(f"{merges} refused: it has more than {TEXT_BYTES} bytes")
