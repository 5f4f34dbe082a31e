"""The published `personalization_config`, which names new words of textual inversion, as a family of tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ldm.errors import InputError


def embedding_manager(
    placeholder_strings: Sequence[str] = ("*",),
    initializer_words: Sequence[str] = (),
    per_image_tokens: bool = False,
    num_vectors_per_token: int = 1,
    progressive_words: bool = False,
) -> list[dict[str, Any]]:
    """The entries of `tuning` that the published arguments ask for.

    Words with an initial word learn, as in textual inversion. Without initial words there are none to learn: such a
    config loads words from a file. Raises `InputError` for what is not supported.
    """
    if per_image_tokens or progressive_words:
        raise InputError("personalization_config: per_image_tokens and progressive_words are not supported; drop them")
    if not initializer_words:
        return []
    if len(initializer_words) != len(placeholder_strings):
        raise InputError(
            f"personalization_config: {len(initializer_words)} initializer_words for {len(placeholder_strings)} "
            "placeholder_strings; give one for each"
        )
    words = {
        word: {"init_word": start, "vectors": num_vectors_per_token}
        for word, start in zip(placeholder_strings, initializer_words, strict=True)
    }
    return [{"target": "ldm.tuning.textual_inversion.TextualInversion", "params": {"words": words}}]
