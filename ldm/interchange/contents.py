"""The neutral forms that formats are read into: LoRA, delta, words, whole weights, our folder. Each is a row.

A row says how to put its form into a model, fold it into weights and describe it, for all formats of that form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.errors import InputError
from ldm.interchange import apply, custom_diffusion, facts, own, packed
from ldm.interchange import kinds as others
from ldm.interchange import lora as loras
from ldm.interchange.custom_diffusion import Delta
from ldm.interchange.kinds import Kinds
from ldm.interchange.lora import Lora
from ldm.modules.encoders.tokens import Vectors, readers, teach
from ldm.tuning import files


@dataclass(frozen=True)
class Loading:
    """How something is put into a model; `source` is its path, for messages."""

    source: str
    scale: float = 1.0
    add: bool = False  # position adapters are attached beside existing ones
    words: Sequence[str] = ()  # other names for the words


@dataclass(frozen=True)
class Form:
    """A row; `value` is what the `reads` of the formats return.

    load: (model, value, loading)
    facts: a value as `ldm inspect` describes it
    summary: a value as commands describe it after writing
    folded: (value, weights, model, strength, source) -> all weights with the value's change added; `model()` is a
    model with those weights
    absent: the message for a source without the form, if it is more than a wrong format
    renames_words: whether `--modifier_token` names its words
    """

    name: str
    load: Callable[[nn.Module, Any, Loading], None] | None
    facts: Callable[[Any], dict[str, Any]]
    summary: Callable[[Any], str]
    folded: Callable[[Any, Mapping[str, Tensor], Callable[[], nn.Module], float, str], dict[str, Tensor]] | None = None
    absent: str = ""
    renames_words: bool = False


def add_tokens(model: nn.Module, tokens: Mapping[str, Vectors], words: Sequence[str] = ()) -> None:
    """Add learnt words to a model's text encoders, under other names if some are given."""
    if words and len(words) != len(tokens):
        held = "+".join(tokens) or "none"
        raise InputError(f"{len(words)} words are named ({'+'.join(words)}), the file holds {len(tokens)}: {held}")
    encoders = readers(model)
    for word, vectors in zip(words or tokens, tokens.values(), strict=True):
        teach(encoders, word, vectors)


def _load_lora(model: nn.Module, lora: Lora, how: Loading) -> None:
    changes = apply.lora_changes(lora, model, how.source)
    model.tuning.remember(changes)
    add_tokens(model, lora.tokens, how.words)
    apply.add(model, changes, how.scale)


def _load_kinds(model: nn.Module, kinds: Kinds, how: Loading) -> None:
    names = [packed.holder(f"{layer}.{name}") for layer in kinds.layers for name in ("weight", "bias")]
    names += [f"{layer}.{name}" for layer in kinds.layers for name in ("weight", "bias")]
    weights = {**apply.parameters(model), **model.tuning.remember(names)}
    changes = others.changes(kinds, weights, how.source, how.scale)
    add_tokens(model, kinds.tokens, how.words)
    apply.add(model, changes)


def _load_delta(model: nn.Module, delta: Delta, how: Loading) -> None:
    changes = custom_diffusion.changes(delta, model.tuning.remember(delta.weights), how.source)
    add_tokens(model, delta.tokens, how.words)
    apply.add(model, changes, how.scale)


def _load_words(model: nn.Module, words: Mapping[str, Vectors], how: Loading) -> None:
    add_tokens(model, words, how.words)


def _load_adapters(model: nn.Module, folder: Path, how: Loading) -> None:
    files.load(model, folder, how.scale, how.add)


def _fold_lora(
    lora: Lora, weights: Mapping[str, Tensor], model: Callable[[], nn.Module], strength: float, source: str
) -> dict[str, Tensor]:
    return apply.merged(weights, loras.changes(lora, weights, source), strength)


def _fold_kinds(
    kinds: Kinds, weights: Mapping[str, Tensor], model: Callable[[], nn.Module], strength: float, source: str
) -> dict[str, Tensor]:
    return apply.merged(weights, others.changes(kinds, weights, source, strength))


def _fold_adapters(
    folder: Path, weights: Mapping[str, Tensor], model: Callable[[], nn.Module], strength: float, source: str
) -> dict[str, Tensor]:
    return own.folded(folder, model(), strength)


CONTENTS = {
    form.name: form
    for form in (
        Form(
            "lora", _load_lora, facts.of_lora, lambda lora: f"{len(lora.layers)} layers, ranks {lora.ranks()}",
            _fold_lora, renames_words=True,
        ),
        Form(
            "kinds", _load_kinds, facts.of_kinds,
            lambda kinds: f"{len(kinds.layers)} layers, {', '.join(kinds.names())}",
            _fold_kinds, absent="holds no changes of layers", renames_words=True,
        ),
        Form(
            "delta", _load_delta, facts.of_delta,
            lambda delta: f"{len(delta.weights)} weights, words {', '.join(delta.tokens) or 'none'}",
            renames_words=True,
        ),
        Form("words", _load_words, facts.of_words, ", ".join, absent="holds no learnt words"),
        Form(
            "model", None, facts.of_model, lambda weights: f"{len(weights)} tensors",
            absent="is no whole model; ldm lora-add MODEL LORA OUT --mode upl-ckpt-v2 puts it into one",
        ),
        Form("adapters", _load_adapters, facts.of_folder, str, _fold_adapters),
    )
}  # fmt: skip
