"""Norm-only tuning: the scales and shifts of the UNet's norms (for diffusion models, arXiv 2304.06648)."""

from __future__ import annotations

from torch import nn

from ldm.tuning import named


class Norms:
    """Weight and bias of every group norm and layer norm of the UNet, without norms that tuning added."""

    def install(self, model: nn.Module) -> None:
        pass

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        norms = {name for name, module in model.named_modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))}
        own = {name for name in norms if name.startswith("model.")}
        return named(model, lambda name: name.rpartition(".")[0] in own and model.tuning.is_base(name))
