"""The loss of the KL-regularised first stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.losses.adversarial import AdversarialLoss


class LPIPSWithDiscriminator(AdversarialLoss):
    """Reconstruction, a small KL term and a patch discriminator: LDM (arXiv 2112.10752) Eq. 25 with KL-reg.

    LDM's arguments; see `AdversarialLoss` for `perceptual_loss` and for what is raised.
    """

    def __init__(
        self,
        disc_start: int,
        logvar_init: float = 0.0,
        kl_weight: float = 1.0,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        perceptual_loss: nn.Module | Mapping | None = None,
    ):
        super().__init__(
            disc_start=disc_start,
            pixelloss_weight=pixelloss_weight,
            disc_num_layers=disc_num_layers,
            disc_in_channels=disc_in_channels,
            disc_factor=disc_factor,
            disc_weight=disc_weight,
            perceptual_weight=perceptual_weight,
            use_actnorm=use_actnorm,
            disc_conditional=disc_conditional,
            disc_loss=disc_loss,
            perceptual_loss=perceptual_loss,
        )
        self.kl_weight, self.logvar_init = kl_weight, logvar_init
        self.logvar = nn.Parameter(torch.tensor(float(logvar_init)))

    def reset_parameters(self) -> None:
        """The random start of the discriminator, and logvar_init."""
        super().reset_parameters()
        nn.init.constant_(self.logvar, self.logvar_init)

    def forward(
        self,
        inputs: Tensor,
        reconstructions: Tensor,
        posteriors: Any,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        weights: Tensor | float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, what to log) for optimizer 0, the autoencoder, or 1, the discriminator. Pictures [b, c, h, w]."""
        if optimizer_idx == 1:
            return self.discriminator_loss(inputs, reconstructions, cond, global_step, split)
        batch = len(inputs)
        rec_loss = self.reconstruction(inputs, reconstructions)
        # A Laplace (pixel_loss l1) likelihood with one scale exp(logvar) for all pixels
        nll = rec_loss / self.logvar.exp() + self.logvar
        nll_loss = nll.sum() / batch
        weighted_nll_loss = (weights * nll).sum() / batch
        kl_loss = posteriors.kl().sum() / batch
        g_loss, d_weight = self.generator_loss(nll_loss, reconstructions, cond, last_layer)
        disc_factor = self.active_factor(global_step)
        loss = weighted_nll_loss + self.kl_weight * kl_loss + d_weight * disc_factor * g_loss
        log = {
            "total_loss": loss,
            "logvar": self.logvar,
            "kl_loss": kl_loss,
            "nll_loss": nll_loss,
            "rec_loss": rec_loss.mean(),
            "d_weight": d_weight,
            "disc_factor": torch.tensor(disc_factor),
            "g_loss": g_loss,
        }
        return loss, {f"{split}/{name}": value.detach() for name, value in log.items()}
