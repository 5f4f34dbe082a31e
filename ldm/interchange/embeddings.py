"""Learnt words (textual inversion): files of LDM, web UIs and diffusers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import save_safetensors, save_torch, write_all
from ldm.errors import InputError
from ldm.interchange.formats import Codec, Context, Opened, open_file
from ldm.modules.encoders.tokens import TOWERS, Vectors, embeddings_in

WEB_UI = "*"  # the word's name inside files of LDM and web UIs; the file name is then the word


def looks_like(content: Any) -> bool:
    """Whether a file holds learnt words: a few vectors of one width, with words as names."""
    if not isinstance(content, Mapping) or not content:
        return False
    if "string_to_param" in content or "emb_params" in content:
        return True
    shapes = [value.shape[-1:] for value in content.values() if isinstance(value, Tensor) and value.dim() in (1, 2)]
    return len(shapes) == len(content) and len(set(shapes)) == 1 and not any("." in str(name) for name in content)


def read(path: str | Path | Opened) -> dict[str, Vectors]:
    """Words with their vectors [v, d], or those for each text encoder (SDXL).

    If a word is called `*` or `emb_params` inside the file, its name is that of the file, `<name>`.
    """
    file = open_file(path)
    found, content = embeddings_in(file.content, file.metadata, file.path), file.content
    name = content.get("name") if isinstance(content.get("name"), str) else file.path.stem
    own = name if name.startswith("<") else f"<{name}>"
    return {own if word in (WEB_UI, "emb_params") else word: vectors for word, vectors in found.items()}


def write_diffusers(path: str | Path, words: Mapping[str, Vectors]) -> list[Path]:
    """Write files for diffusers' `load_textual_inversion`, see `diffusers_files`. Returns the files."""
    files = diffusers_files(path, words)
    write_all(files)
    return list(files)


def diffusers_files(path: str | Path, words: Mapping[str, Vectors]) -> dict[Path, Callable[[Path], None]]:
    """One file for each word and the function that writes it; several words go into a folder, `path`."""
    path = Path(path)
    names = [re.sub(r"[^\w-]+", "_", word.strip("<>")) for word in words]  # `<a/b>` cannot be a file name
    if len(set(names)) < len(names):
        names = [f"{number}-{name}" for number, name in enumerate(names)]
    several = {path / f"{name}.safetensors": {word: words[word]} for name, word in zip(names, words, strict=True)}
    files = {path: words} if len(words) == 1 else several
    return {file: partial(_save_words, words=content) for file, content in files.items()}


def _save_words(path: Path, words: Mapping[str, Vectors]) -> None:
    """One word of SDXL as `clip_l` and `clip_g`; other words by their names."""
    named: dict[str, Tensor] = {}
    for word, vectors in words.items():
        named |= dict(zip(TOWERS, vectors, strict=True)) if isinstance(vectors, tuple) else {word: vectors}
    save_safetensors(path, {word: v[0] if len(v) == 1 else v for word, v in named.items()}, {"format": "pt"})


def write_ldm(path: str | Path, words: Mapping[str, Vectors]) -> None:
    """Write LDM's layout, which web UIs read too: {"string_to_token": ..., "string_to_param": {word: [v, d]}}."""
    if not words:
        raise InputError("there are no words to write")
    if any(isinstance(vectors, tuple) for vectors in words.values()):
        raise InputError("LDM's files of words are for one text encoder; write these with --to words")
    only = len(words) == 1
    inside = {WEB_UI if only else word: vectors for word, vectors in words.items()}
    extra = {"name": next(iter(words))} if only else {}
    ids = dict.fromkeys(inside, 265)  # the id of `*` in CLIP's vocabulary, which readers expect to be there
    save_torch(path, {"string_to_token": ids, "string_to_param": inside, **extra})


# --- the rows


def _read(file: Opened, context: Context) -> dict[str, Vectors]:
    return read(file)


WORDS = Codec(
    lambda file: looks_like(file.content), {"words": _read}, lambda path, words, _: write_diffusers(path, words)
)
LDM = Codec(lambda file: False, {"words": _read}, lambda path, words, _: write_ldm(path, words))
