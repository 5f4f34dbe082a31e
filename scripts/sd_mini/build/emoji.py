"""The table of emoji: which exist, what they are called, and which skin tones they come in."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

TONES = {"1f3fb": "light", "1f3fc": "medium light", "1f3fd": "medium", "1f3fe": "medium dark", "1f3ff": "dark"}


@dataclass(frozen=True)
class Emoji:
    """One emoji as it can be drawn by any vendor: `name` in plain words, `tone` "" or the words of its skin tone."""

    code: str  # lower-case code points joined by "-", without the variation selector fe0f
    name: str
    keywords: tuple[str, ...]
    group: str  # subcategory of emoji-datasource, e.g. "cat-face"
    image: str  # file name within emoji-datasource
    tone: str = ""


def plain_code(unified: str) -> str:
    """Code points as all vendors spell them: "1F468-200D-2764-FE0F" -> "1f468-200d-2764"."""
    return "-".join(part.lstrip("0") for part in unified.lower().replace("_", "-").split("-") if part != "fe0f")


def plain_name(name: str) -> str:
    """Words out of a name of emojilib: "woman_s_hat" -> "woman's hat", "three_o_clock" -> "three o'clock"."""
    words = re.sub(r"[_ ]+", " ", name).strip().lower()
    return re.sub(r"\b(woman|man|women|men|worker) s\b", r"\1's", words).replace("o clock", "o'clock")


def read_emoji(names: Path, words: Path) -> list[Emoji]:
    """Every emoji in Unicode's order, each followed by its skin tones; of couples, none of the tone pairs.

    names: folder of emoji-datasource; words: folder of emojilib.
    """
    library = json.loads((words / "dist/emoji-en-US.json").read_text(encoding="utf-8"))
    rows = []
    for entry in sorted(json.loads((names / "emoji.json").read_text(encoding="utf-8")), key=lambda e: e["sort_order"]):
        first, *keywords = library.get("".join(chr(int(c, 16)) for c in entry["unified"].split("-")), [None])
        if first is None:
            continue  # the five skin tone patches, which are no pictures of anything
        emoji = Emoji(
            code=plain_code(entry["unified"]),
            name=plain_name(first),
            keywords=tuple(k.replace("_", " ").lower() for k in keywords),
            group=entry["subcategory"],
            image=entry["image"],
        )
        rows.append(emoji)
        for tone, variant in entry.get("skin_variations", {}).items():
            if tone.lower() in TONES:
                code = plain_code(variant["unified"])
                rows.append(replace(emoji, code=code, image=variant["image"], tone=TONES[tone.lower()]))
    return rows
