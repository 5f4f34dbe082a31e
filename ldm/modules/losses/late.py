"""The loss of the KL-regularised first stage, without the cost of its discriminator until it starts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.modules.losses.contperceptual import LPIPSWithDiscriminator


class LateDiscriminator(LPIPSWithDiscriminator):
    """As `LPIPSWithDiscriminator`, but the discriminator is not computed before step `disc_start`.

    The trained weights are the same, because its part of the loss is 0 until then. A step of a small autoencoder takes
    a third of the time.
    """

    waiting = True

    def forward(
        self, inputs: Tensor, reconstructions: Tensor, posteriors: Any, optimizer_idx: int, global_step: int, **rest
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.waiting = global_step < self.disc_start
        return super().forward(inputs, reconstructions, posteriors, optimizer_idx, global_step, **rest)

    def generator_loss(
        self, nll_loss: Tensor, reconstructions: Tensor, cond: Tensor | None, last_layer: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.waiting:
            return torch.zeros_like(nll_loss), torch.zeros_like(nll_loss)
        return super().generator_loss(nll_loss, reconstructions, cond, last_layer)

    def discriminator_loss(
        self, inputs: Tensor, reconstructions: Tensor, cond: Tensor | None, global_step: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.waiting:
            return 0.0 * sum(parameter.sum() for parameter in self.discriminator.parameters()), {}
        return super().discriminator_loss(inputs, reconstructions, cond, global_step, split)
