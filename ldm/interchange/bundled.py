"""Learnt words inside LoRA files: `bundle_emb.<name>.string_to_param.*` of web UIs, `.clip_l`, `.clip_g` of OneTrainer.

The name is the word, as that of a file of its own is (`FileWord`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ldm.errors import InputError
from ldm.modules.encoders.tokens import TOWERS, FileWord, Vectors, towers

PARAM = "string_to_param.*"
KEY = re.compile(r"bundle_emb\.(.+)\.(string_to_param\.\*|string_to_param|emb_params|clip_l|clip_g)")


def taken_out(weights: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, Vectors]]:
    """The weights without the words, and the words. Raises `InputError` for words without vectors."""
    found: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, value in weights.items():
        if (key := KEY.fullmatch(name)) is None:
            rest[name] = value
        elif value.dim() in (1, 2):
            found.setdefault(key[1], {})[key[2]] = value.float().reshape(-1, value.shape[-1])
        else:
            raise InputError(f"{source}: {name} must be vectors [v, d], got {list(value.shape)}")
    return rest, {FileWord.of_name(name): _vectors(parts, source) for name, parts in found.items()}


def written(words: Mapping[str, Vectors]) -> dict[str, Tensor]:
    """The tensors of words in a LoRA file, as A1111 reads them: a word is called as in prompts.

    Raises `InputError` for a word with a dot, at which readers end its name.
    """
    words = {word[1:-1] if isinstance(word, FileWord) else word: vectors for word, vectors in words.items()}
    if dotted := [word for word in words if "." in word]:
        raise InputError(f"{dotted[0]} has a dot, at which web UIs end the name of a word in a LoRA file: --to words")
    found = {}
    for word, vectors in words.items():
        parts = dict(zip(TOWERS, vectors, strict=True)) if isinstance(vectors, tuple) else {PARAM: vectors}
        found |= {f"bundle_emb.{word}.{name}": value.detach().cpu().clone() for name, value in parts.items()}
    return found


def _vectors(parts: Mapping[str, Tensor], source: str) -> Vectors:
    if set(parts) == set(TOWERS):
        return towers(parts, source)
    if len(parts) > 1:
        raise InputError(f"{source}: a word has {' and '.join(parts)}; expected one of them, or {' and '.join(TOWERS)}")
    return next(iter(parts.values()))
