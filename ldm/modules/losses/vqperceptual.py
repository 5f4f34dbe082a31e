"""The loss of the vector-quantised first stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.modules.losses.adversarial import AdversarialLoss


def measure_perplexity(indices: Tensor, n_embed: int) -> tuple[Tensor, Tensor]:
    """(perplexity, how many) of the codebook entries in use: n_embed if all are used alike, 1 if only one is."""
    frequencies = F.one_hot(indices.flatten(), n_embed).float().mean(0)
    return (-(frequencies * (frequencies + 1e-10).log()).sum()).exp(), (frequencies > 0).sum()


class VQLPIPSWithDiscriminator(AdversarialLoss):
    """Reconstruction, codebook loss and a patch discriminator: VQGAN (arXiv 2012.09841) Eqs. 4 to 7.

    LDM's arguments; see `AdversarialLoss` for those that are shared and for what is raised.
    """

    def __init__(self, disc_start: int, codebook_weight: float = 1.0, n_classes: int | None = None, **shared: Any):
        super().__init__(disc_start, **shared)
        self.codebook_weight, self.n_classes = codebook_weight, n_classes

    def forward(
        self,
        codebook_loss: Tensor,
        inputs: Tensor,
        reconstructions: Tensor,
        optimizer_idx: int,
        global_step: int,
        last_layer: Tensor | None = None,
        cond: Tensor | None = None,
        split: str = "train",
        predicted_indices: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, what to log) for optimizer 0, the autoencoder, or 1, the discriminator. Pictures [b, c, h, w]."""
        if optimizer_idx == 1:
            return self.discriminator_loss(inputs, reconstructions, cond, global_step, split)
        rec_loss = self.reconstruction(inputs, reconstructions).mean()
        g_loss, d_weight = self.generator_loss(rec_loss, reconstructions, cond, last_layer)
        disc_factor = self.active_factor(global_step)
        quant_loss = codebook_loss.mean()
        loss = rec_loss + d_weight * disc_factor * g_loss + self.codebook_weight * quant_loss
        log = {
            "total_loss": loss,
            "quant_loss": quant_loss,
            "nll_loss": rec_loss,
            "rec_loss": rec_loss,
            "d_weight": d_weight,
            "disc_factor": torch.tensor(disc_factor),
            "g_loss": g_loss,
        }
        if predicted_indices is not None and self.n_classes is not None:
            log["perplexity"], log["cluster_usage"] = measure_perplexity(predicted_indices, self.n_classes)
        return loss, {f"{split}/{name}": value.detach() for name, value in log.items()}
