"""Custom Diffusion's deltas (arXiv 2212.04488): tuned cross-attention weights with the vectors of new words.

Three layouts: the published LDM one {"state_dict": {full names..., "embed": rows}}, the published diffusers one
{"unet": {...}, "modifier_token": {word: vector}}, with the weights of a trained "text_encoder" if there is one, and the
flat one of diffusers' own script (`attn_procs.py` writes it), whose words lie beside it.
Compressed deltas hold {"u", "v"} instead of a weight: low-rank factors of the change of the pretrained weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.checkpoints import refuse_not_finite, save_torch
from ldm.errors import InputError, short
from ldm.interchange.formats import Codec, Opened, open_file
from ldm.interchange.names import (
    TEXT,
    UNET,
    inverse,
    layout_of_attention,
    layout_of_diffusers_attention,
    translate_all,
    unet_table,
)
from ldm.modules.encoders.tokens import read_embeddings

EMBEDDINGS = TEXT + "text_model.embeddings.token_embedding.weight"
NEW_TOKENS = ".new_tokens.vectors."  # behind the name of a text encoder
# The layers to save, by `freeze_model`. The published code always saves only keys and values.
SAVED = {"crossattn-kv": r"\.attn2\.to_[kv]\.weight$", "crossattn": r"\.attn2\."}
COMPRESSED = re.compile(SAVED["crossattn-kv"])


class LowRank(NamedTuple):
    """The change of a pretrained weight: u [out, r] @ v [r, in]; u includes the singular values."""

    u: Tensor
    v: Tensor


@dataclass
class Delta:
    """Tuned weights by LDM's full parameter names, whole or as low-rank changes, and words with vectors [v, d]."""

    weights: dict[str, Tensor | LowRank]
    tokens: dict[str, Tensor] = field(default_factory=dict)


# --- files


def kind_of(content: Any) -> str | None:
    """`ldm`, `diffusers` or `flat` for the content of a delta file; None for something else."""
    if not isinstance(content, Mapping):
        return None
    if isinstance(content.get("unet"), Mapping):
        return "diffusers"
    if any("_custom_diffusion" in str(key) for key in content):
        return "flat"
    state = content.get("state_dict", content)
    is_delta = isinstance(state, Mapping) and bool(state) and all(map(_in_delta, state))
    return "ldm" if is_delta and any(str(key).startswith(UNET) for key in state) else None


def _in_delta(key: Any) -> bool:
    return key == "embed" or ".attn2." in str(key) or str(key).startswith(TEXT)


def read(path: str | Path | Opened, words: Sequence[str] = ()) -> Delta:
    """Read a delta of any layout. `words` name the rows of `embed`, which has none: by default <new1>, <new2>, ...

    Raises `InputError` for a file of another kind, for unknown layer names, and for too few words.
    """
    file = open_file(path)
    path, content = file.path, file.content
    kind = kind_of(content)
    if kind is None:
        raise InputError(f"{path} is no Custom Diffusion delta: expected attn2 weights, got {short(content)}")
    if kind == "ldm":
        state = dict(content.get("state_dict", content))
        tokens = _named(state.pop("embed", None), words, path)
    elif kind == "flat":  # attention layers that are not trained have empty mappings
        state = _in_ldm_names({name: value for name, value in content.items() if value != {}}, path)
        tokens = words_beside(path)
    else:
        text = content.get("text_encoder") or {}
        state = _in_ldm_names(content["unet"], path) | _text_in_ldm_names(text, path)
        tokens = _vectors(content.get("modifier_token") or {}, path)
    entries = {name: _entry(value, name, path) for name, value in state.items()}
    flat = {name: [one] if isinstance(one, Tensor) else [one.u, one.v] for name, one in entries.items()}
    parts = {f"{name} [{place}]": part for name, held in flat.items() for place, part in enumerate(held)}
    refuse_not_finite(parts | tokens, str(path))
    return Delta(entries, tokens)


def words_beside(path: str | Path) -> dict[str, Tensor]:
    """The words that diffusers' script writes beside its weights: `<new1>.bin` or `<new1>.safetensors`, one a word."""
    files = [file for file in sorted(Path(path).parent.glob("<*>.*")) if file.suffix in (".bin", ".safetensors")]
    return {word: vectors for file in files for word, vectors in read_embeddings(file).items()}


def _text_in_ldm_names(weights: Any, path: str | Path) -> dict[str, Any]:
    """The weights of a trained text encoder by LDM's full parameter names."""
    if not isinstance(weights, Mapping):
        raise InputError(f"{path}: text_encoder must hold weights by name, got {short(weights)}")
    names = {n: f"{TEXT}text_model.{n.removeprefix('text_model.')}" for n in map(str, weights)}
    return {names[str(n)]: value for n, value in weights.items() if not str(n).endswith("position_ids")}


def _in_ldm_names(weights: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The weights of a diffusers file by LDM's full parameter names."""
    if not weights:
        return {}
    state = {_plain(name): value for name, value in weights.items()}
    names = translate_all(state, inverse(unet_table(layout_of_diffusers_attention(state))), str(path))
    return {UNET + names[name]: value for name, value in state.items()}


def _vectors(found: Any, path: str | Path) -> dict[str, Tensor]:
    """`modifier_token` of a diffusers file: words and their vectors [v, d]."""
    vectors = found.values() if isinstance(found, Mapping) else [found]
    if not all(isinstance(one, Tensor) and one.dim() in (1, 2) for one in vectors):
        raise InputError(f"{path}: modifier_token must map words to vectors, got {short(found)}")
    return {word: vector.float().reshape(-1, vector.shape[-1]) for word, vector in found.items()}


def _plain(name: str) -> str:
    return name.replace(".processor.", ".").replace("_custom_diffusion", "")


def _entry(value: Any, name: str, path: str | Path) -> Tensor | LowRank:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping) and value.keys() == {"u", "v"}:
        u, v = value["u"], value["v"]
        if all(isinstance(one, Tensor) and one.dim() == 2 for one in (u, v)) and u.shape[1] == v.shape[0]:
            return LowRank(u, v)
    raise InputError(f"{path}: {name} is neither a weight nor its compression {{u, v}}, got {short(value)}")


def _named(rows: Tensor | None, words: Sequence[str], path: str | Path) -> dict[str, Tensor]:
    if rows is None:
        return {}
    if not isinstance(rows, Tensor) or rows.dim() != 2:
        raise InputError(f"{path}: embed must be vectors [words, width], got {short(rows)}")
    words = list(words) or [f"<new{i + 1}>" for i in range(len(rows))]
    if len(words) != len(rows):
        raise InputError(f"{path} has {len(rows)} new words, --modifier_token names {len(words)}: {'+'.join(words)}")
    return {word: row[None].float() for word, row in zip(words, rows, strict=True)}


def split_words(words: str | None) -> list[str]:
    """`--modifier_token "<new1>+<new2>"` as a list."""
    return [word for word in (words or "").split("+") if word]


def content_of(delta: Delta, kind: str = "ldm") -> dict[str, Any]:
    """The content of a delta file in the layout `ldm` or `diffusers`."""
    state = {n: {"u": w.u, "v": w.v} if isinstance(w, LowRank) else w.detach() for n, w in delta.weights.items()}
    if several := [word for word, vectors in delta.tokens.items() if len(vectors) > 1]:
        raise InputError(f"a delta holds one vector for a word; {several[0]} has {len(delta.tokens[several[0]])}")
    if kind == "ldm":
        embed = {"embed": torch.cat(list(delta.tokens.values()))} if delta.tokens else {}
        return {"state_dict": {**state, **embed}}
    text = {name.removeprefix(TEXT): value for name, value in state.items() if name.startswith(TEXT)}
    return {
        "unet": in_diffusers_names({name: value for name, value in state.items() if not name.startswith(TEXT)}),
        "modifier_token": {word: vectors[0] for word, vectors in delta.tokens.items()},
        **({"text_encoder": text} if text else {}),
    }


def in_diffusers_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of the UNet's attention by diffusers' names within the UNet."""
    table = unet_table(layout_of_attention(weights)) if weights else {}
    names = translate_all([name.removeprefix(UNET) for name in weights], table, "the delta")
    return {names[name.removeprefix(UNET)]: value for name, value in weights.items()}


def write(path: str | Path, delta: Delta, kind: str = "ldm") -> None:
    """Write a delta in the `ldm` or the `diffusers` layout, atomically."""
    save_torch(path, content_of(delta, kind))


# --- from a checkpoint


def extract(
    weights: Mapping[str, Tensor], newtoken: int = 1, freeze_model: str = "crossattn-kv", source: str = "the checkpoint"
) -> Delta:
    """The delta in a checkpoint's weights: its cross-attention, and its last `newtoken` words.

    `freeze_model` says what was trained; the published code saves keys and values in either case.
    Words are the last rows of the embedding table or, if the checkpoint has them, the vectors beside the table.
    """
    if newtoken < 0:
        raise InputError(f"--newtoken {newtoken}: expected how many new words there are, 0 or more")
    wanted = re.compile(SAVED[freeze_model])
    tuned = {n: value.clone() for n, value in weights.items() if n.startswith(UNET) and wanted.search(n)}
    if not tuned:
        raise InputError(f"{source} has no cross-attention weights (attn2): nothing to extract")
    beside = [value for name, value in weights.items() if NEW_TOKENS in name]
    if newtoken and not beside and EMBEDDINGS not in weights:
        raise InputError(f"{source} has no text embeddings to take {newtoken} new words from; use --newtoken 0")
    rows = torch.cat(beside) if beside else weights.get(EMBEDDINGS)
    if newtoken and newtoken > len(rows):
        raise InputError(f"{source} has {len(rows)} words, fewer than --newtoken {newtoken}")
    return Delta(tuned, _named(rows[-newtoken:].clone() if newtoken else None, (), source))


# --- changes of a model


def changes(delta: Delta, pretrained: Mapping[str, Tensor], source: str = "the delta") -> dict[str, Tensor]:
    """The change of pretrained weights by parameter name. Raises `InputError` if the delta does not fit."""
    result = {}
    for name, value in delta.weights.items():
        base = pretrained.get(name)
        if name == EMBEDDINGS and base is not None:
            value = _released_rows(value, len(base), len(delta.tokens), source)
        shape = (value.u.shape[0], value.v.shape[1]) if isinstance(value, LowRank) else tuple(value.shape)
        if base is None:
            raise InputError(f"{source} does not fit this model, which has no weight {name}")
        if tuple(base.shape) != shape:
            raise InputError(
                f"{source} was made for another base model: {name} has shape {list(shape)}, here {list(base.shape)}"
            )
        result[name] = (
            value.u @ value.v if isinstance(value, LowRank) else value.float() - base.float().to(value.device)
        )
    return result


def _released_rows(table: Tensor | LowRank, rows: int, words: int, source: str) -> Tensor | LowRank:
    """A trained embedding table without the rows of its new words, which follow those of the released table."""
    if isinstance(table, LowRank) or len(table) == rows:
        return table
    if len(table) - rows != words:
        raise InputError(
            f"{source}: its text encoder has {len(table)} words, this model {rows}; expected {words} more, the new ones"
        )
    return table[:rows]


def whole(delta: Delta, pretrained: Mapping[str, Tensor], source: str = "the delta") -> Delta:
    """The delta with whole weights instead of compressed ones."""
    added = changes(delta, pretrained, source)
    weights = {
        name: pretrained[name].float() + added[name] if isinstance(value, LowRank) else value
        for name, value in delta.weights.items()
    }
    return Delta(weights, delta.tokens)


def compress(delta: Delta, pretrained: Mapping[str, Tensor], ratio: float = 0.6, source: str = "the delta") -> Delta:
    """Keys and values as low-rank changes that keep a fraction of the spectrum (arXiv 2212.04488, section 3.3).

    The rank is the published one: the index of the first singular value at which the cumulative fraction of the sum
    (not of the squares) exceeds `ratio`. That value itself is left out, so slightly less than `ratio` is kept.
    """
    if not 0 < ratio <= 1:
        raise InputError(f"--compression_ratio must be above 0 and at most 1, got {ratio}")
    weights: dict[str, Tensor | LowRank] = dict(delta.weights)
    for name, change in changes(delta, pretrained, source).items():
        if COMPRESSED.search(name):
            u, s, vh = torch.linalg.svd(change, full_matrices=False)
            rank = kept_rank(s, ratio)
            weights[name] = LowRank((u[:, :rank] * s[:rank]).contiguous(), vh[:rank].contiguous())
    return Delta(weights, delta.tokens)


def kept_rank(singular_values: Tensor, ratio: float) -> int:
    """The number of kept singular values, see `compress`; with a ratio of 1 all but the last."""
    share = singular_values.cumsum(0) / singular_values.sum()
    above = (share > ratio).nonzero() if ratio < 1 else share.new_zeros(0)
    return int(above[0]) if len(above) else len(singular_values) - 1


# --- the rows

READS = {
    "delta": lambda file, context: read(file, context.words),
    "words": lambda file, context: read(file, context.words).tokens,
}
LDM = Codec(
    lambda file: kind_of(file.content) == "ldm", READS, lambda path, delta, _: write(path, delta, "ldm")
)
DIFFUSERS = Codec(
    lambda file: kind_of(file.content) == "diffusers",
    READS,
    lambda path, delta, _: write(path, delta, "diffusers"),
)
