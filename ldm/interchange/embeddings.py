"""Learnt words (textual inversion): files of LDM, web UIs and diffusers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import save_safetensors, save_torch, write_all
from ldm.errors import InputError
from ldm.interchange.formats import Codec, Context, Opened, open_file
from ldm.modules.encoders.tokens import (
    TOWERS,
    WILDCARD,
    FileWord,
    Vectors,
    embeddings_in,
    is_bracketed,
    named_after,
    words_file,
)

log = logging.getLogger(__name__)

LEAST_WIDTH = 16  # of vectors; what has fewer numbers and dots in its names is something else


def looks_like(content: Any) -> bool:
    """Whether a file holds learnt words: a few vectors of one width, with words as names."""
    if not isinstance(content, Mapping) or not content:
        return False
    if "string_to_param" in content or "emb_params" in content or set(content) == set(TOWERS):
        return True
    shapes = [value.shape[-1:] for value in content.values() if isinstance(value, Tensor) and value.dim() in (1, 2)]
    is_one_width = len(shapes) == len(content) and len(set(shapes)) == 1
    return is_one_width and all(_can_be_word(str(name), shapes[0][0]) for name in content)


def _can_be_word(name: str, width: int) -> bool:
    """Names of parameters have dots, too."""
    is_parameter = name.rpartition(".")[2] in ("weight", "bias", "alpha", "scale") or name.count(".") > 1
    return "." not in name or is_bracketed(name) or (width >= LEAST_WIDTH and not is_parameter)


def read(path: str | Path | Opened) -> dict[str, Vectors]:
    """Words with their vectors [v, d], or those for each text encoder (SDXL).

    A word that is called `*` or `emb_params` inside has the name of its file, as in web UIs, whatever `name` says.
    """
    file = open_file(path)
    found, content = embeddings_in(file.content, file.metadata, file.path), file.content
    words = named_after(found, file.path)
    inner, told = content.get("name"), "%s is called %s inside; its word is the name of the file, %s, as in web UIs"
    for word in words:
        if isinstance(word, FileWord) and isinstance(inner, str) and inner.strip("<>") != word.strip("<>"):
            log.info(told, file.given, inner, word)
    return words


def write_diffusers(path: str | Path, words: Mapping[str, Vectors]) -> list[Path]:
    """Write files for diffusers' `load_textual_inversion`, see `diffusers_files`. Returns the files."""
    return _write(diffusers_files(path, words))


def diffusers_files(path: str | Path, words: Mapping[str, Vectors]) -> dict[Path, Callable[[Path], None]]:
    """One file for each word and the function that writes it; several words go into a folder, `path`."""
    return {file: partial(_save_words, word=w, vectors=words[w]) for w, file in _places(path, words, "safetensors")}


def _places(path: str | Path, words: Iterable[str], suffix: str) -> list[tuple[str, Path]]:
    """The file of each word: `path` for one, files in that folder for several."""
    path, words = Path(path), list(words)
    if len(words) == 1:
        return [(words[0], path)]
    return [(word, path / f"{name}.{suffix}") for word, name in zip(words, file_names(words), strict=True)]


def file_names(words: Iterable[str]) -> list[str]:
    """Different names of files for words, without brackets and suffix; `<a/b>` cannot be one."""
    names = [re.sub(r"[^\w.-]+", "_", word.strip("<>")) for word in words]
    return names if len(set(names)) == len(names) else [f"{number}-{name}" for number, name in enumerate(names)]


def _write(files: Mapping[Path, Callable[[Path], None]]) -> list[Path]:
    write_all(files)
    return list(files)


def _save_words(path: Path, word: str, vectors: Vectors) -> None:
    """One word of SDXL as `clip_l` and `clip_g`; another word by its name."""
    named = dict(zip(TOWERS, vectors, strict=True)) if isinstance(vectors, tuple) else {str(word): vectors}
    save_safetensors(path, {name: v[0] if len(v) == 1 else v for name, v in named.items()}, {"format": "pt"})


def write_ldm(path: str | Path, words: Mapping[str, Vectors]) -> list[Path]:
    """Write LDM's layout, which web UIs read too: {"string_to_token": ..., "string_to_param": {"*": [v, d]}}.

    Web UIs refuse files of two words and call a word by the name of its file. So several words go into a folder,
    `path`, one file each. Returns the files.
    """
    if not words:
        raise InputError("there are no words to write")
    if any(isinstance(vectors, tuple) for vectors in words.values()):
        raise InputError("LDM's files of words are for one text encoder; write these with --to words")
    return _write({file: partial(_save_ldm, word=w, vectors=words[w]) for w, file in _places(path, words, "pt")})


def _save_ldm(path: Path, word: str, vectors: Tensor) -> None:
    ids = {WILDCARD: 265}  # the id of `*` in CLIP's vocabulary, which readers expect to be there
    save_torch(path, {"string_to_token": ids, "string_to_param": {WILDCARD: vectors}, "name": str(word)})


# --- the rows


def _read(file: Opened, context: Context) -> dict[str, Vectors]:
    return read(file)


WORDS = Codec(
    lambda file: looks_like(file.content), {"words": _read}, lambda path, words, _: write_diffusers(path, words),
    file_in=words_file,
)  # fmt: skip
LDM = Codec(lambda file: False, {"words": _read}, lambda path, words, _: write_ldm(path, words))
