"""Grids and labelled rows of pictures, for documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ldm.checkpoints import atomic_write
from ldm.generate import grid, to_pil


def save_grid(pictures: Tensor, columns: int, path: str | Path) -> None:
    """Pictures [b, 3, h, w] in 0 .. 1, row by row, as one JPEG."""
    with atomic_write(path) as beside:
        to_pil(grid(list(pictures), columns)).save(beside, quality=88)


def labelled_rows(
    rows: Mapping[str, Sequence[Tensor]], side: int = 128, gap: int = 6, heads: Sequence[str] = ()
) -> Image.Image:
    """One row of pictures [3, h, w] in [0, 1] for each label, each `side` pixels wide, with the label above.

    heads: a text for each column, above the first row
    """
    font = ImageFont.load_default(size=max(12, side // 8))
    line = font.size + 2 * gap
    columns = max(len(pictures) for pictures in rows.values())
    small = ImageFont.load_default(size=max(9, side // 12))
    texts = [wrapped(text, small, side) for text in heads]
    head = max((text.count("\n") + 1 for text in texts), default=0) * (small.size + 3) + (gap if texts else 0)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, head + len(rows) * (line + side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(texts):
        draw.multiline_text((gap + column * (side + gap), gap), text, fill="black", font=small, spacing=1)
    for row, (label, pictures) in enumerate(rows.items()):
        top = head + row * (line + side + gap)
        draw.text((gap, top + gap), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(to_pil(fit(picture, side)), (gap + column * (side + gap), top + line))
    return sheet


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text in lines of at most `width` pixels; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def fit(picture: Tensor, side: int) -> Tensor:
    """A picture [3, h, w] as [3, side, side]; small pictures are enlarged by repetition, so they stay sharp."""
    larger = side >= picture.shape[-1]
    how = {"mode": "nearest-exact"} if larger else {"mode": "bilinear", "antialias": True}
    return F.interpolate(picture[None].float(), (side, side), **how)[0].clamp(0, 1)
