"""What a CLIP folder claims to be, looked at before transformers builds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import InputError, short
from ldm.files import TEXT_BYTES, read_json

# No encoder of a latent diffusion model is larger; OpenCLIP's bigG has 48 layers and a width of 1664.
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
}
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
PARAMETERS = 2**31


def check_clip(folder: Path) -> None:
    """Raises `InputError` for a `config.json` that is none or that asks for a network of absurd size."""
    config = read_json(folder / "config.json")
    if not isinstance(config, Mapping):
        raise InputError(f"{folder / 'config.json'} must be a mapping, got {short(config)}")
    for part in (config, config.get("text_config") or {}, config.get("vision_config") or {}):
        if not isinstance(part, Mapping):
            raise InputError(f"{folder / 'config.json'}: expected a mapping in it, got {short(part)}")
        for key, most in LARGEST.items():
            if key in part and not _is_size(part[key], most):
                raise InputError(
                    f"{folder / 'config.json'}: {key} must be a whole number from 1 to {most}, got {short(part[key])}"
                )
        width, inner = part.get("hidden_size", 0), part.get("intermediate_size", 0)
        layers = part.get("num_hidden_layers", 0) * (4 * width**2 + 2 * width * inner)
        if layers + (part.get("vocab_size", 0) + part.get("max_position_embeddings", 0)) * width > PARAMETERS:
            raise InputError(f"{folder / 'config.json'} asks for more than {PARAMETERS} parameters")


def check_tokenizer(folder: Path) -> None:
    """Raises `InputError` for files of a tokenizer that are too large or nested too deeply."""
    for name in FILES:
        if (folder / name).is_file():
            read_json(folder / name)
    merges = folder / "merges.txt"
    if merges.is_file() and merges.stat().st_size > TEXT_BYTES:
        raise InputError(f"{merges} refused: it has more than {TEXT_BYTES} bytes")


def _is_size(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
