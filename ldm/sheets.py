"""Sheets of pictures with captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ldm.generate import to_pil


def labelled_rows(
    rows: Mapping[str, Sequence[Tensor]], side: int = 128, gap: int = 6, heads: Sequence[str] = ()
) -> Image.Image:
    """One row of pictures [3, h, w] in [0, 1] for each label, whose longer sides are `side` pixels, the label above.

    heads: a text for each column, above the first row
    """
    font = ImageFont.load_default(size=max(12, side // 8))
    columns = max(len(pictures) for pictures in rows.values())
    labels = [wrapped(label, font, columns * (side + gap) - gap) for label in rows]
    lines = [(label.count("\n") + 1) * (font.size + 3) + 2 * gap for label in labels]
    small = ImageFont.load_default(size=max(9, side // 12))
    texts = [wrapped(text, small, side) for text in heads]
    head = max((text.count("\n") + 1 for text in texts), default=0) * (small.size + 3) + (gap if texts else 0)
    height = head + sum(lines) + len(rows) * (side + gap)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, text in enumerate(texts):
        draw.multiline_text((gap + column * (side + gap), gap), text, fill="black", font=small, spacing=1)
    top = head
    for label, line, pictures in zip(labels, lines, rows.values(), strict=True):
        draw.multiline_text((gap, top + gap), label, fill="black", font=font, spacing=3)
        for column, picture in enumerate(pictures):
            sheet.paste(to_pil(fit(picture, side)), (gap + column * (side + gap), top + line))
        top += line + side + gap
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
    """A picture [3, h, w] so that its longer side is `side`. Small ones are enlarged by repetition and stay sharp."""
    height, width = picture.shape[1:]
    longer = max(height, width)
    size = max(1, round(height * side / longer)), max(1, round(width * side / longer))
    how = {"mode": "nearest-exact"} if side >= longer else {"mode": "bilinear", "antialias": True}
    return F.interpolate(picture[None].float(), size, **how)[0].clamp(0, 1)
