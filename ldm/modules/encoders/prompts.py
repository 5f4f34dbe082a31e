"""Prompts in the style of web UIs: longer than the text encoder's window, with weights such as (word:1.3).

A long prompt is split into windows of the encoder's length, and the results are concatenated, because cross-attention
takes any number of tokens. A weight multiplies the hidden states of its tokens; then the mean of the prompt is
restored, as in A1111's web UI.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.errors import InputError

WEIGHTS = {"(": 1.1, "[": 1 / 1.1}  # of (word) and [word]
NESTED = 50  # largest depth of nested brackets
PIECES = re.compile(r"\\[()\[\]\\]|\(|\)|\[|\]|:\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*\)|[^\\()\[\]:]+|.", re.DOTALL)


class Part(NamedTuple):
    """A part of a prompt and the weight of its tokens."""

    text: str
    weight: float


def weighted_parts(prompt: str) -> list[Part]:
    """Split a prompt with `(more)`, `[less]`, `(by number:1.3)` and `\\(brackets\\)` into parts with weights.

    Unclosed brackets extend to the end of the prompt. Raises `InputError` for more than `NESTED` nested brackets.
    """
    parts: list[list[Any]] = []
    open_brackets: list[tuple[str, int]] = []  # and the number of the first part within

    def weigh(start: int, factor: float) -> None:
        for part in parts[start:]:
            part[1] *= factor

    for piece in PIECES.findall(prompt):
        closed, factor = _closes(piece)
        if piece in WEIGHTS:
            open_brackets.append((piece, len(parts)))
            if len(open_brackets) > NESTED:
                raise InputError(f"a prompt has more than {NESTED} brackets in each other")
        elif open_brackets and open_brackets[-1][0] == closed:
            weigh(open_brackets.pop()[1], factor)
        else:
            parts.append([piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0])
    for bracket, start in open_brackets:
        weigh(start, WEIGHTS[bracket])
    same_weight = itertools.groupby(parts, key=lambda part: part[1])
    return [Part("".join(text for text, _ in run), weight) for weight, run in same_weight] or [Part("", 1.0)]


def _closes(piece: str) -> tuple[str | None, float]:
    """The bracket that a piece closes, or None, and the weight of the text within."""
    if piece.startswith(":") and piece.endswith(")"):
        return "(", float(piece[1:-1])
    bracket = {")": "(", "]": "["}.get(piece)
    return bracket, WEIGHTS.get(bracket, 1.0)


class Tokens(NamedTuple):
    """The tokens of a prompt, without markers, and the weight of each."""

    ids: list[int]
    weights: list[float]


def tokens_of(encoder: Any, prompt: str, weighted: bool) -> Tokens:
    """All tokens of a prompt, without limit."""
    parts = weighted_parts(prompt) if weighted else [Part(prompt, 1.0)]
    ids = [encoder.tokens_of(part.text) for part in parts]
    weights = [part.weight for part, own in zip(parts, ids, strict=True) for _ in own]
    return Tokens([token for own in ids for token in own], weights)


def windows(tokens: Tokens, size: int) -> list[Tokens]:
    """Split tokens into windows of at most `size`; at least one window."""
    starts = range(0, max(len(tokens.ids), 1), size)
    return [Tokens(tokens.ids[i : i + size], tokens.weights[i : i + size]) for i in starts]


def window_count(encoder: Any, prompts: Sequence[str], weighted: bool = False) -> int:
    """The number of windows of the longest prompt."""
    size = encoder.max_length - 2  # the first and the last token are markers
    return max(len(windows(tokens_of(encoder, prompt, weighted), size)) for prompt in prompts)


def encode(encoder: Any, prompts: Sequence[str], weighted: bool = False, count: int | None = None) -> Tensor:
    """Prompts of any length as hidden states [b, count * max_length, d]; `count`: at least that many windows.

    encoder: has `tokens_of`, `with_markers` and `encode_ids`, as `FrozenCLIPEmbedder` does. For a prompt of one window
    without weights the result equals that of the encoder.
    """
    size = encoder.max_length - 2
    all_tokens = [tokens_of(encoder, prompt, weighted) for prompt in prompts]
    count = max(count or 1, *(len(windows(tokens, size)) for tokens in all_tokens))
    rows = []
    for tokens in all_tokens:
        own = windows(tokens, size)
        rows.append(own + [Tokens([], [])] * (count - len(own)))
    encoded = [encoder.encode_ids(encoder.with_markers([row[number].ids for row in rows])) for number in range(count)]
    weights = [_of_window([row[number].weights for row in rows], encoder.max_length) for number in range(count)]
    states, factors = torch.cat(encoded, dim=1), torch.cat(weights, dim=1).to(encoded[0])
    if bool((factors == 1).all()):
        return states
    before = states.mean(dim=(1, 2), keepdim=True)
    states = states * factors[..., None]
    return states * (before / states.mean(dim=(1, 2), keepdim=True))


def _of_window(weights: Sequence[Sequence[float]], length: int) -> Tensor:
    """Weights [b, length]: 1 for markers and padding."""
    rows = [[1.0, *own, *[1.0] * (length - 1 - len(own))] for own in weights]
    return torch.tensor(rows)


def cut_words(encoder: Any, prompt: str) -> str:
    """The end of a prompt that does not fit into the encoder's single window; empty if all of it fits."""
    words = prompt.split()
    if len(encoder.tokens_of(prompt)) <= encoder.max_length - 2:
        return ""
    low, high = 0, len(words)  # the most words that fit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(encoder.tokens_of(" ".join(words[:middle]))) <= encoder.max_length - 2 else (
            low, middle - 1
        )  # fmt: skip
    return " ".join(words[low:])
