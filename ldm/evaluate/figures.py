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


def labelled_rows(rows: Mapping[str, Sequence[Tensor]], side: int = 128, gap: int = 6) -> Image.Image:
    """One row of pictures [3, h, w] in [0, 1] for each label, each `side` pixels wide, with the label above."""
    font = ImageFont.load_default(size=max(12, side // 8))
    line = font.size + 2 * gap
    columns = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (columns * (side + gap) + gap, len(rows) * (line + side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, pictures) in enumerate(rows.items()):
        top = row * (line + side + gap)
        draw.text((gap, top + gap), label, fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(to_pil(fit(picture, side)), (gap + column * (side + gap), top + line))
    return sheet


def fit(picture: Tensor, side: int) -> Tensor:
    """A picture [3, h, w] as [3, side, side]; small pictures are enlarged by repetition, so they stay sharp."""
    larger = side >= picture.shape[-1]
    how = {"mode": "nearest-exact"} if larger else {"mode": "bilinear", "antialias": True}
    return F.interpolate(picture[None].float(), (side, side), **how)[0].clamp(0, 1)
