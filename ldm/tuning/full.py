"""Full fine-tuning: the baseline that the others are measured against."""

from __future__ import annotations

from torch import nn

from ldm.tuning import named


class UNet:
    """Every weight of the UNet, adapters included if there are any."""

    def install(self, model: nn.Module) -> None:
        pass

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return named(model, lambda name: name.startswith("model."))


class ConditionStage:
    """Every weight of the text encoder (or whatever encodes the condition)."""

    def install(self, model: nn.Module) -> None:
        pass

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return named(model, lambda name: name.startswith("cond_stage_model."))
