"""Adapters with a named input and output position in the blocks of the UNet (arXiv 2303.18181)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ldm.checkpoints import is_adapter
from ldm.modules.adapters import attach_adapters
from ldm.tuning import named


class PositionAdapters:
    """The adapters that the UNet has from its own `adapter_config`, and those of the one given here."""

    def __init__(self, adapter_config: Mapping | None = None) -> None:
        self.adapter_config = adapter_config

    def install(self, model: nn.Module) -> None:
        attach_adapters(model.model.diffusion_model, self.adapter_config)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return named(model, lambda name: name.startswith("model.") and is_adapter(name))
