"""Custom Diffusion: tunes the cross-attention of the UNet for a new concept (arXiv 2212.04488, section 3.2)."""

from __future__ import annotations

from torch import nn

from ldm.errors import InputError
from ldm.modules.encoders.tokens import readers
from ldm.tuning.full import ByName
from ldm.tuning.textual_inversion import TextualInversion, word_ids

# `freeze_model` of the published YAML names the part that is *not* frozen.
PARTS = {"crossattn-kv": r"\.attn2\.to_[kv]\.weight$", "crossattn": r"\.attn2\."}

# Initial words of new tokens, from the last token to the first: rare words of CLIP's vocabulary.
RARE_WORDS = ("ktn", "pll", "ucd")


class CrossAttention(ByName):
    """`crossattn-kv`: the keys and values of the cross-attention; `crossattn`: all its weights."""

    def __init__(self, freeze_model: str = "crossattn-kv") -> None:
        if freeze_model not in PARTS:
            raise InputError(f"freeze_model must be one of {', '.join(PARTS)}, got {freeze_model!r}")
        super().__init__(r"^model\.diffusion_model\..*" + PARTS[freeze_model])


class ModifierTokens(TextualInversion):
    """New tokens, `<new1>+<new2>`, that start at the vectors of `init_word` (`cat+dog`), by default `RARE_WORDS`.

    If the vocabulary lacks a rare word, the token starts at random, as in `TextualInversion`.
    """

    def __init__(self, modifier_token: str, init_word: str | None = None) -> None:
        words = modifier_token.split("+")
        starts = init_word.split("+") if init_word else [None] * len(words)
        if len(starts) != len(words):
            raise InputError(
                f"init_word {init_word!r} has {len(starts)} words for the {len(words)} of {modifier_token!r}"
            )
        super().__init__({word: {"init_word": start} for word, start in zip(words, starts, strict=True)})

    def install(self, model: nn.Module) -> None:
        for how, rare in zip(list(self.words.values())[::-1], RARE_WORDS, strict=False):
            known = all(len(word_ids(encoder, rare)) == 1 for encoder in readers(model).values())
            if how["init_word"] is None and known:
                how["init_word"] = rare
        super().install(model)
