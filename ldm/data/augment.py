"""Random changes of colours, those of PyTorch's ColorJitter, by kornia. Each draw has random numbers of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm import schema


class Colours:
    """Brightness, contrast, saturation and hue, each changed by up to its setting, and grey pictures now and then.

    settings: see `ldm.schema.Augment`. Raises `InputError`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        schema.check_part(schema.Augment, settings, "augment")
        self.chosen = chosen = schema.Augment(**settings)
        self.changes = any((chosen.brightness, chosen.contrast, chosen.saturation, chosen.hue, chosen.grey))

    def __call__(self, pixels: Tensor, draws: torch.Generator) -> Tensor:
        """uint8 [3, h, w] -> float32 [3, h, w] in 0..255."""
        from kornia.color import rgb_to_grayscale  # imported here because it takes a third of a second
        from kornia.enhance import adjust_brightness, adjust_contrast, adjust_hue, adjust_saturation

        *change, grey = torch.rand(5, generator=draws).tolist()
        brightness, contrast, saturation, hue = (2 * value - 1 for value in change)  # -1 .. 1
        values = pixels[None].float() / 255
        values = adjust_brightness(values, self.chosen.brightness * brightness)
        values = adjust_contrast(values, 1 + self.chosen.contrast * contrast)
        values = adjust_saturation(values, 1 + self.chosen.saturation * saturation)
        values = adjust_hue(values, self.chosen.hue * hue * torch.pi * 2)
        if grey < self.chosen.grey:
            values = rgb_to_grayscale(values).expand_as(values)
        return values.clamp(0, 1)[0] * 255
