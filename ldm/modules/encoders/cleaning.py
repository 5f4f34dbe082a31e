"""Prompts as the published tokenizers of CLIP clean them before they look words up.

ftfy repairs text that was decoded wrongly, straightens quotes and full-width letters, and turns HTML entities into
what they stand for where the text has no `<`. Both tokenizers were trained and are used with it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable


def clip_text(text: str) -> str:
    """CLIP-L's: repaired, white space collapsed, lower case."""
    import ftfy

    return _one_line(ftfy.fix_text(text)).lower()


def open_clip_text(text: str) -> str:
    """OpenCLIP's: the same, and HTML entities unescaped twice, also beside a `<`."""
    import ftfy

    return _one_line(html.unescape(html.unescape(ftfy.fix_text(text)))).lower()


def around(clean: Callable[[str], str], text: str, names: Iterable[str]) -> str:
    """`text` with everything cleaned but for these names, which a tokenizer knows whole."""
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    if not pattern:
        return clean(text)
    pieces = re.split(f"({pattern})", text)
    return "".join(piece if number % 2 else clean(piece) for number, piece in enumerate(pieces))


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
