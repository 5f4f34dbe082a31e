"""Textual inversion: trains the vectors of new words; the embedding table is frozen (arXiv 2208.01618, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError, short
from ldm.modules.encoders.tokens import readers, teach


class TextualInversion:
    """New words of the text encoder, or of both text encoders if a model has two. Nothing else is trained.

    Args:
        words: one, several, or a mapping from words to their own `{init_word, vectors}`.
        init_word: the vectors start at those of this word, which must have one token, or one token for each vector.
        A number draws them from N(0, number^2). By default they come from N(mean, variance) of the whole table.
        vectors: how many vectors a word has; a prompt is that much longer.
        norm_weight: after each step at learning rate r, the norms move by the fraction min(1, norm_weight * r) towards
            the mean norm of the released table, decoupled from the loss as in arXiv 1711.05101. 0: no change.
        seed: of random starts.

    Raises `InputError` for a word that the encoder already knows, and for an `init_word` that it does not know.
    """

    def __init__(
        self,
        words: str | Sequence[str] | Mapping[str, Mapping[str, Any] | None],
        init_word: str | float | None = None,
        vectors: int = 1,
        norm_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        words = [words] if isinstance(words, str) else words
        own = words if isinstance(words, Mapping) else dict.fromkeys(words)
        self.words = {word: {"init_word": init_word, "vectors": vectors} | dict(own[word] or {}) for word in own}
        for word, how in self.words.items():
            if not isinstance(word, str) or not word or len(word.split()) != 1:
                raise InputError(f"words: expected words without spaces such as <new1>, got {word!r}")
            if how.keys() != {"init_word", "vectors"}:
                raise InputError(f"words: {word} has the keys {', '.join(how)}; expected init_word and vectors")
            if not isinstance(how["vectors"], int) or how["vectors"] < 1:
                raise InputError(
                    f"words: vectors of {word} must be a whole number of at least 1, got {how['vectors']!r}"
                )
        if not self.words or norm_weight < 0:
            raise InputError(f"expected at least one word and norm_weight >= 0, got {short(words)} and {norm_weight}")
        self.norm_weight, self.seed = norm_weight, seed

    def install(self, model: nn.Module) -> None:
        encoders = readers(model)
        if not encoders:
            kind = type(model.cond_stage_model).__name__
            raise InputError(f"{kind} reads no words, so it can learn none; use FrozenCLIPEmbedder")
        for number, (word, how) in enumerate(self.words.items()):
            if any(len(word_ids(encoder, word)) == 1 for encoder in encoders.values()):
                raise InputError(f"the text encoder knows {word!r} already; choose another name, e.g. <{word}>")
            starts = [self._start(encoder, word, number, **how) for encoder in encoders.values()]
            teach(encoders, word, tuple(starts))

    def adds(self, model: nn.Module, _source: str) -> int:
        widths = sum(released_table(encoder).shape[1] for encoder in readers(model).values())
        return sum(how["vectors"] for how in self.words.values()) * widths

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for name, encoder in readers(model).items():
            found |= {f"{name}.new_tokens.vectors.{key}": value for key, value in self._vectors(encoder).items()}
        return found

    def _vectors(self, encoder: nn.Module) -> dict[str, nn.Parameter]:
        """The vectors of the words in one text encoder, by the names of their tokens."""
        tokens = encoder.new_tokens
        keys = [key for word in self.words if word in tokens.words for key in tokens.words[word].split()]
        return {key: tokens.vectors[key] for key in keys}

    @torch.no_grad()
    def after_step(self, model: nn.Module, rate: float) -> None:
        share = min(1.0, self.norm_weight * rate)
        for encoder in readers(model).values() if share else ():
            target = released_table(encoder).norm(dim=1).mean()
            for vector in self._vectors(encoder).values():
                vector.mul_(1 + share * (target / vector.norm() - 1))

    def _start(self, encoder: nn.Module, word: str, number: int, init_word: Any, vectors: int) -> Tensor:
        """The initial vectors [v, d] of a word."""
        table = released_table(encoder)
        if isinstance(init_word, str):
            ids = word_ids(encoder, init_word)
            if len(ids) not in (1, vectors):
                raise InputError(
                    f"init_word {init_word!r} has {len(ids)} tokens here: give {word} vectors: {len(ids)}, "
                    "or name a word of one token"
                )
            return table[ids].expand(vectors, -1).clone()
        noise = torch.randn(vectors, table.shape[1], generator=torch.Generator().manual_seed(self.seed + number))
        noise = noise.to(table.device, table.dtype)
        return noise * init_word if init_word is not None else table.mean(0) + table.std(0) * noise


def released_table(encoder: nn.Module) -> Tensor:
    """The released embedding table [n, d] of the encoder."""
    return encoder.token_embedding.weight.detach()


def word_ids(encoder: nn.Module, word: str) -> list[int]:
    """The ids of a word's tokens; for a learnt word those of its vectors."""
    return encoder.ids_in(word)
