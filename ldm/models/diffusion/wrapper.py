"""The UNet in the wrapper that passes it the condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import instantiate_from_config
from ldm.errors import InputError


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join contexts [b, m, d]. A single one stays the same tensor, for `ldm.modules.cached_text`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


# The condition for each `conditioning_key` as inputs of the UNet: (channels to append, context, class labels).
CONDITIONING = {
    None: lambda concat, cross: ([], None, None),
    "concat": lambda concat, cross: (concat, None, None),
    "crossattn": lambda concat, cross: ([], joined(cross), None),
    "hybrid": lambda concat, cross: (concat, joined(cross), None),
    "adm": lambda concat, cross: ([], None, cross[0]),
}


class DiffusionWrapper(nn.Module):
    """The UNet and the way in which the condition enters it."""

    def __init__(self, diff_model_config: Mapping, conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING:
            raise InputError(f"conditioning_key must be one of {list(CONDITIONING)}, got {conditioning_key!r}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self, x: Tensor, t: Tensor, c_concat: list[Tensor] | None = None, c_crossattn: list[Tensor] | None = None
    ) -> Tensor:
        channels, context, labels = CONDITIONING[self.conditioning_key](c_concat, c_crossattn)
        return self.diffusion_model(torch.cat([x, *channels], dim=1), t, context=context, y=labels)


class OpenAIWrapper(nn.Module):
    """SDXL's UNet. Its condition is a dict with `crossattn` (the context), `vector`, and `concat` (more channels)."""

    def __init__(self, diffusion_model: nn.Module, compile_model: bool = False) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model
        if compile_model:
            self.diffusion_model.compile()

    def forward(self, x: Tensor, t: Tensor, c: Mapping[str, Tensor], **more: Any) -> Tensor:
        x = torch.cat([x, c["concat"]], dim=1) if "concat" in c else x
        return self.diffusion_model(x, t, context=c.get("crossattn"), y=c.get("vector"), **more)
