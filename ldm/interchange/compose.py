"""Several concepts of Custom Diffusion in one set of weights, in closed form (arXiv 2212.04488, section 3.2, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.interchange.custom_diffusion import COMPRESSED, Delta, whole
from ldm.interchange.names import TEXT

RIDGE = 1e-6  # relative to the mean square of the rows; without it, rounding decides if there are too few rows


def solve(weight: Tensor, regular: Tensor, target: Tensor, values: Tensor) -> Tensor:
    """The weight [out, in] nearest to a given one that maps target rows [t, in] to values [t, out].

    Nearness is measured on the regularisation rows [n, in]: minimise |(W' - W) C^T| subject to W' c = v, by Lagrange
    multipliers. Computed in float64 and returned in the dtype of `weight`. With fewer different rows than inputs, many
    weights are equally near; then `RIDGE` selects the one with the smallest change.
    """
    w, k, c, v = (tensor.double() for tensor in (weight, regular, target, values))
    square = k.T @ k
    if torch.linalg.matrix_rank(square, hermitian=True, rtol=RIDGE**2) < len(square):
        square.diagonal().add_(RIDGE * square.diagonal().mean())
    try:
        d = torch.linalg.solve(square, c.T).T  # [t, in], rows c C^-1
        change = (v.T - w @ c.T) @ torch.linalg.solve(d @ c.T, d)
    except torch.linalg.LinAlgError as error:
        raise InputError(
            f"the closed form has no solution ({error}): give more regularisation prompts, or targets that differ"
        ) from None
    return (w + change).to(weight.dtype)


@torch.no_grad()
def token_features(encoder: Any, prompts: Sequence[str]) -> Tensor:
    """Hidden states [n, d] of the tokens of prompts, from the start to the end of each text, duplicates once."""
    rows = []
    for prompt in prompts:
        length = len(encoder.tokenizer(encoder.new_tokens.spell(prompt)).input_ids)
        rows.append(encoder([prompt])[0, :length].cpu())  # the pretrained weights are on the CPU
    return torch.unique(torch.cat(rows), dim=0)


def target_prompts(words: Sequence[str], category: str, prompts: Sequence[str] | None) -> list[str]:
    """Prompts that call a concept `<new1> category`; `{}` in given prompts stands for it."""
    name = " ".join([*words, category])
    if not prompts:
        return [name]
    return [prompt.replace("{}", name) if "{}" in prompt else prompt.replace(category, name) for prompt in prompts]


def compose(
    encoder: Any,
    pretrained: Mapping[str, Tensor],
    deltas: Sequence[Delta],
    categories: Sequence[str],
    regularization: Sequence[str],
    prompts: Sequence[Sequence[str] | None] | None = None,
) -> Delta:
    """One delta for several concepts. New words are renamed <new1>, <new2>, ... in the order of the deltas.

    Adds the new words to `encoder`. Raises `InputError` for deltas of different layers or with a trained text encoder,
    and for lists of unequal length.
    """
    if len(deltas) != len(categories) or len(deltas) < 2:
        raise InputError(
            f"{len(deltas)} deltas and {len(categories)} categories: expected one for each, and at least two"
        )
    for number, delta in enumerate(deltas, 1):
        if text := [name for name in delta.weights if name.startswith(TEXT)]:
            raise InputError(
                f"delta {number} changes the text encoder ({text[0]}), which the closed form cannot compose"
            )
    deltas = [whole(delta, pretrained) for delta in deltas]
    layers = _layers(deltas)
    tokens: dict[str, Tensor] = {}
    features = []
    for delta, category, own in zip(deltas, categories, prompts or [None] * len(deltas), strict=True):
        words = [f"<new{len(tokens) + i + 1}>" for i in range(len(delta.tokens))]
        for word, vectors in zip(words, delta.tokens.values(), strict=True):
            tokens[word] = vectors
            encoder.add_token(word, vectors)
        features.append(token_features(encoder, target_prompts(words, category, own)))
    regular = token_features(encoder, regularization)
    target = torch.cat(features)
    # Several concepts may share a row, e.g. the start token, with different target values: the first concept's counts.
    _, first = _first_of_each(target)
    target = target[first]
    weights = {}
    for name in layers:
        values = [c.float() @ delta.weights[name].float().T for c, delta in zip(features, deltas, strict=True)]
        weights[name] = solve(pretrained[name].float(), regular, target, torch.cat(values)[first])
    return Delta(weights, tokens)


def _layers(deltas: Sequence[Delta]) -> list[str]:
    """The layers of the deltas. Raises `InputError` if the deltas have different layers."""
    first, *others = ([name for name in delta.weights if COMPRESSED.search(name)] for delta in deltas)
    if any(set(other) != set(first) for other in others):
        raise InputError("the deltas change different layers: they were made for different base models")
    return first


def _first_of_each(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows, and the index of the first occurrence of each."""
    unique, place = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(rows), dtype=torch.long)
    first.scatter_reduce_(0, place.cpu(), torch.arange(len(rows)), "amin")
    return unique, first.sort().values
