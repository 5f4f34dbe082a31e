"""Pictures with random masks, for training on inpainting models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.data.dreambooth import Item, PersonalizedBase
from ldm.errors import InputError, short

SMALLEST, LARGEST = 0.25, 0.75  # sides of masks relative to the picture's side


class MaskedPictures(PersonalizedBase):
    """The draws of `PersonalizedBase`, each with a new random mask for inpainting.

    Besides `image` and `caption`, an item has `mask` float32 [size, size, 1], 1 where the model paints, and
    `masked_image` [size, size, 3], the picture with zeros there. With probability `whole` the mask is the whole
    picture, so that the model also learns to draw the subject from the prompt alone; else it is an ellipse or a
    rectangle at a random place, whose sides are a quarter to three quarters of the picture's. Sample k depends only on
    (`seed`, k). Raises `InputError` as `PersonalizedBase` does, and if `whole` is not a probability.
    """

    why_not_cached = "masks are drawn at random"

    def __init__(self, *args: Any, whole: float = 0.25, **more: Any) -> None:
        super().__init__(*args, **more)
        if not isinstance(whole, (int, float)) or not 0 <= whole <= 1:
            raise InputError(f"whole: expected a probability from 0 to 1, got {short(whole)}")
        self.whole = whole

    def sample(self, k: int) -> Item:
        item = super().sample(k)
        mask = random_mask(torch.rand(6, generator=self._generator("mask", k)), self.size, self.whole)[..., None]
        return {**item, "mask": mask, "masked_image": item["image"] * (1 - mask)}


def random_mask(draws: Tensor, size: int, whole: float) -> Tensor:
    """A mask [size, size] of zeros and ones from six uniform numbers."""
    is_whole, is_ellipse, *shape = draws.tolist()
    if is_whole < whole:
        return torch.ones(size, size)
    height, width = (SMALLEST + (LARGEST - SMALLEST) * u for u in shape[:2])
    top, left = (u * (1 - side) for u, side in zip(shape[2:], (height, width), strict=True))
    middle = (torch.arange(size) + 0.5) / size
    down, across = (middle - top - height / 2).abs() / (height / 2), (middle - left - width / 2).abs() / (width / 2)
    if is_ellipse < 0.5:
        return (down[:, None] ** 2 + across[None, :] ** 2 <= 1).float()
    return ((down[:, None] <= 1) & (across[None, :] <= 1)).float()
