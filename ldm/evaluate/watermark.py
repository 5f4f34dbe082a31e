"""The invisible watermark of Stable Diffusion's programs, with the package invisible-watermark (extra `watermark`)."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.errors import InputError
from ldm.generate import from_pil, to_pil

log = logging.getLogger(__name__)

PUBLISHED = "StableDiffusionV1"
METHOD = "dwtDct"  # as published: in the wavelet and cosine coefficients of a colour channel
SMALLEST = 256  # pixels in all: the package refuses pictures of fewer than 256 x 256


def _package() -> Any:
    try:
        import imwatermark
    except ImportError:
        raise InputError(
            "watermarks need the package invisible-watermark: pip install invisible-watermark, or --watermark off"
        ) from None
    return imwatermark


class Watermark:
    """Writes a text into pictures. Raises `InputError` without the package and for an empty text."""

    def __init__(self, text: str) -> None:
        if not text:
            raise InputError("--watermark needs a text, or off")
        self.encoder = _package().WatermarkEncoder()
        self.encoder.set_watermark("bytes", text.encode("utf-8"))
        self.text, self.too_small = text, False

    def marked(self, picture: Tensor) -> Tensor:
        """A picture [3, H, W] in [0, 1] with the watermark. Too small pictures are returned unchanged, which is
        logged."""
        if picture.shape[1] * picture.shape[2] < SMALLEST**2:
            if not self.too_small:
                log.info("no watermark: pictures need at least %d x %d pixels for it", SMALLEST, SMALLEST)
            self.too_small = True
            return picture
        blue_first = np.array(to_pil(picture))[..., ::-1]
        marked = self.encoder.encode(np.ascontiguousarray(blue_first), METHOD)
        return from_pil(Image.fromarray(np.ascontiguousarray(marked[..., ::-1])))


def find_watermark(text: str | None) -> Watermark | None:
    """The writer of a text; None for `off`. Without a given text and without the package also None, which is logged."""
    if text == "off":
        return None
    if text is None:
        try:
            return Watermark(PUBLISHED)
        except InputError as error:
            log.info("no watermark: %s", error)
            return None
    return Watermark(text)


def read_watermark(picture: Image.Image, length: int = len(PUBLISHED)) -> str:
    """The text of `length` bytes in an RGB picture; invalid bytes are replaced. Raises `InputError`."""
    if picture.width * picture.height < SMALLEST**2:
        raise InputError(f"the picture has fewer than {SMALLEST} x {SMALLEST} pixels: it can hold no watermark")
    decoder = _package().WatermarkDecoder("bytes", 8 * length)
    found = decoder.decode(np.ascontiguousarray(np.array(picture)[..., ::-1]), METHOD)
    return bytes(found).decode("utf-8", errors="replace")


def finish(pictures: list[torch.Tensor], checker: Any, watermark: Watermark | None) -> list[Tensor]:
    """Apply the safety checker, then the watermark."""
    pictures = pictures if checker is None else checker.checked(pictures)
    return pictures if watermark is None else [watermark.marked(one) for one in pictures]
