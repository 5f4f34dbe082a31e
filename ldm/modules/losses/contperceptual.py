"""The loss of the KL-regularised first stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.losses.adversarial import AdversarialLoss


class LPIPSWithDiscriminator(AdversarialLoss):
    """Reconstruction, a small KL term and a patch discriminator: LDM (arXiv 2112.10752) Eq. 25 with KL-reg.

    LDM's arguments; see `AdversarialLoss` for those that are shared and for what is raised.
    """

    GIVEN = ("disc_ndf", "pixel_loss")  # arguments of the parent alone

    def __init__(self, disc_start: int, logvar_init: float = 0.0, kl_weight: float = 1.0, **shared: Any):
        super().__init__(disc_start, **shared)
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
