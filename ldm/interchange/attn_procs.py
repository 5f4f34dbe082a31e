"""Custom Diffusion as diffusers' own script writes it, for `unet.load_attn_procs`.

A flat file {"<block>.attn2.processor.to_k_custom_diffusion.weight": weight, ...} with an empty mapping for every
attention layer that is not trained, and a file `<word>.bin` beside it for each new word.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from ldm.checkpoints import save_torch, write_all
from ldm.errors import InputError
from ldm.interchange.custom_diffusion import READS, Delta, LowRank, in_diffusers_names, kind_of, words_beside
from ldm.interchange.embeddings import file_names
from ldm.interchange.formats import Codec, Context
from ldm.interchange.layers import dialects
from ldm.interchange.names import UNET

FILES = ("pytorch_custom_diffusion_weights.bin", "pytorch_custom_diffusion_weights.safetensors")
KEYS = {"to_k.weight", "to_v.weight"}  # diffusers' processor has these, and all of `OTHERS` or none
OTHERS = {"to_q.weight", "to_out.0.weight", "to_out.0.bias"}


def file_in(folder: Path) -> Path:
    """The file in a folder of diffusers' script, or the path itself."""
    return next((file for name in FILES if (file := Path(folder) / name).is_file()), Path(folder))


def content_of(delta: Delta, context: Context) -> dict[str, Any]:
    """The content of the file of weights. Raises `InputError` for a delta that the format cannot hold."""
    if others := [name for name in delta.weights if not name.startswith(UNET)]:
        raise InputError(f"diffusers' Custom Diffusion format holds no weights outside the UNet, such as {others[0]}")
    if any(isinstance(value, LowRank) for value in delta.weights.values()):
        raise InputError("diffusers' Custom Diffusion format holds whole weights, and this delta is compressed")
    unet = [name for name in dialects(context.model)["diffusers"].values() if name.startswith("unet.")]
    named = [name.removeprefix("unet.").removesuffix(".to_q") for name in unet if name.endswith(".to_q")]
    held: dict[str, dict[str, Any]] = {name: {} for name in named}
    for name, value in in_diffusers_names(delta.weights).items():
        layer, _, role = re.sub(r"\.(to_\w+)", r"|\1", name, count=1).partition("|")
        if layer not in held:
            raise InputError(f"this config's model has no attention layer {layer}; use --config of the delta's model")
        held[layer][role] = value
    for layer, roles in held.items():
        if roles and roles.keys() not in (KEYS, KEYS | OTHERS):
            raise InputError(
                f"diffusers' Custom Diffusion format holds keys and values of a layer, or all of its weights; "
                f"{layer} has {', '.join(roles)}"
            )
    content: dict[str, Any] = {}
    for layer, roles in held.items():
        stem = f"{layer}.processor"
        content |= {f"{stem}.{_custom(role)}": value for role, value in roles.items()} or {stem: {}}
    return content


def _custom(role: str) -> str:
    """`to_k.weight` as `to_k_custom_diffusion.weight`."""
    return re.sub(r"^to_\w+", r"\g<0>_custom_diffusion", role)


def write(path: Path, delta: Delta, context: Context) -> list[Path]:
    """Write the weights, and the words beside them; a path without a suffix is a folder. Returns the files.

    Raises `InputError` where words of another delta lie beside it, because readers would take them as well.
    """
    path = path if path.suffix else path / FILES[0]
    words = zip(file_names(delta.tokens), delta.tokens.items(), strict=True)
    files = {path.with_name(f"<{name}>.bin"): {word: rows[0]} for name, (word, rows) in words}
    if foreign := words_beside(path).keys() - delta.tokens.keys():
        raise InputError(f"{path.parent} holds the word {min(foreign)} of another delta: name another folder")
    if several := [word for word, rows in delta.tokens.items() if len(rows) > 1]:
        raise InputError(f"a delta holds one vector for a word; {several[0]} has {len(delta.tokens[several[0]])}")
    contents = {**files, path: content_of(delta, context)}
    write_all({target: partial(_save, content=content) for target, content in contents.items()})
    return [path, *files]


def _save(path: Path, content: Any) -> None:
    save_torch(path, content)


CUSTOM = Codec(lambda file: kind_of(file.content) == "flat", READS, write, file_in=file_in)
