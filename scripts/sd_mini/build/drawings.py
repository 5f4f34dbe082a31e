"""The vendors' drawings: where each keeps the picture of an emoji, and how it becomes 64 x 64 RGBA."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.errors import InputError
from scripts.sd_mini.build.emoji import Emoji, plain_code


@dataclass(frozen=True)
class Drawing:
    """One vendor's picture of one emoji. Styles of one `family` are the same design in another finish."""

    emoji: Emoji
    style: str
    family: str
    path: Path


def drawings(table: list[Emoji], style: str, family: str, find: Callable[[Emoji], Path | None]) -> list[Drawing]:
    """The drawings of one style: every emoji of the table that the vendor has drawn."""
    found = ((emoji, find(emoji)) for emoji in table)
    return [Drawing(emoji, style, family, path) for emoji, path in found if path is not None]


def by_image(folder: Path) -> Callable[[Emoji], Path | None]:
    """emoji-datasource has one PNG per emoji, under the name in its table."""
    present = {path.name: path for path in folder.glob("*.png")}
    return lambda emoji: present.get(emoji.image)


def by_code(folder: Path, suffix: str) -> Callable[[Emoji], Path | None]:
    """OpenMoji and Fluent 3D name their files by code points."""
    present = {plain_code(path.stem): path for path in folder.glob(f"*{suffix}")}
    return lambda emoji: present.get(emoji.code)


def by_name(folder: Path) -> Callable[[Emoji], Path | None]:
    """fluentui-emoji names its files in words: grinning-cat.svg, woman-shrugging-medium-dark.svg, ...-default.svg."""
    present = {path.stem: path for path in folder.glob("*.svg")}

    def find(emoji: Emoji) -> Path | None:
        slug = re.sub(r"[^a-z0-9]+", "-", emoji.name.replace("'", "")).strip("-")
        if emoji.tone:
            return present.get(f"{slug}-{emoji.tone.replace(' ', '-')}")
        return present.get(slug) or present.get(f"{slug}-default")

    return find


def read_picture(path: Path, size: int) -> np.ndarray:
    """A picture file -> uint8 [size, size, 4], antialiased, alpha straight (not premultiplied)."""
    if path.suffix == ".svg":
        try:
            import resvg_py
        except ImportError:
            raise InputError("drawing SVG needs the package resvg_py; pip install resvg_py") from None
        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size))))
    else:
        image = Image.open(path)
    image = image.convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)  # PIL premultiplies while it resizes
    return np.asarray(image)
