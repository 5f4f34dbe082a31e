"""A training of Custom Diffusion that begins at what an earlier one learnt, its delta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.interchange import apply, custom_diffusion
from ldm.modules.encoders.tokens import readers


@torch.no_grad()
def begin_at_delta(model: Any, path: str | Path) -> list[str]:
    """Put the weights and words of a delta into a model that trains them. Returns the words.

    Rows without names are those of the model's words, in their order. Raises `InputError` for weights that the config
    does not train, and for words that it does not learn.
    """
    encoders = readers(model)
    words = list(dict.fromkeys(word for encoder in encoders.values() for word in encoder.new_tokens.words))
    delta = custom_diffusion.read(path, words)
    learning = model.trainable_parameters()
    if foreign := [name for name in delta.weights if name not in learning]:
        raise InputError(f"--delta_ckpt {path}: this config does not train {foreign[0]} ({len(foreign)} such); "
                         "crossattn in the delta needs --freeze_model crossattn")  # fmt: skip
    if unknown := [word for word in delta.tokens if word not in words]:
        raise InputError(f"--delta_ckpt {path} holds the word {unknown[0]}; this run learns "
                         f"{', '.join(words) or 'none'}: name it by --modifier_token")  # fmt: skip
    pairs = [pair for word, rows in delta.tokens.items() for pair in _vectors(encoders, word, rows, path)]
    apply.add(model, custom_diffusion.changes(delta, learning, str(path)))
    for own, row in pairs:
        own.copy_(row[None])
    return list(delta.tokens)


def _vectors(
    encoders: Mapping[str, Any], word: str, rows: Tensor, path: str | Path
) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The vectors of a word in each encoder, with their new values."""
    for encoder in encoders.values():
        own = [encoder.new_tokens.vectors[name] for name in encoder.new_tokens.words[word].split()]
        if (len(own), own[0].shape[-1]) != tuple(rows.shape):
            raise InputError(f"--delta_ckpt {path}: {word} has vectors of shape {list(rows.shape)}, here "
                             f"[{len(own)}, {own[0].shape[-1]}]; it was learnt on another base")  # fmt: skip
        yield from zip(own, rows, strict=True)
