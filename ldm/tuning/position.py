"""Adapters with a named input and output position in the blocks of the UNet (arXiv 2303.18181)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ldm.modules.adapters import attach_adapters
from ldm.tuning import UNET, named


class PositionAdapters:
    """The adapters of an `adapter_config`, by default that of the UNet, in every block of their kind."""

    def __init__(self, adapter_config: Mapping | None = None) -> None:
        self.adapter_config = adapter_config
        self.prefixes: tuple[str, ...] = ()

    def install(self, model: nn.Module) -> None:
        attached = attach_adapters(model.model.diffusion_model, self.adapter_config)
        self.prefixes = tuple(f"{UNET}{name}." for name in attached)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return named(model, lambda name: name.startswith(self.prefixes)) if self.prefixes else {}
