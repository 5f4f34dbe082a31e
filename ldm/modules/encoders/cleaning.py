"""Cleans prompts as the published tokenizers of CLIP do.

ftfy repairs wrongly decoded text, straightens quotes and full-width letters, and replaces HTML entities if the text has
no `<`. Both tokenizers were trained with it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable


def clip_text(text: str) -> str:
    """For CLIP-L: repair, collapse white space, lower case."""
    import ftfy

    return _one_line(ftfy.fix_text(text)).lower()


def open_clip_text(text: str) -> str:
    """For OpenCLIP: the same, and unescape HTML entities twice, even with a `<` in the text."""
    import ftfy

    return _one_line(html.unescape(html.unescape(ftfy.fix_text(text)))).lower()


def around(clean: Callable[[str], str], text: str, names: Iterable[str]) -> str:
    """Clean `text` except for these names, which the tokenizer treats as single tokens."""
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    if not pattern:
        return clean(text)
    pieces = re.split(f"({pattern})", text)
    return "".join(piece if number % 2 else clean(piece) for number, piece in enumerate(pieces))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
