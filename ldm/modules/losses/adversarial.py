"""Common to the losses of both first stages: reconstruction, perceptual term and patch discriminator.

LDM (arXiv 2112.10752) Eq. 25, after VQGAN (arXiv 2012.09841) Eqs. 5 to 7.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config import instantiate_from_config
from ldm.errors import InputError

log = logging.getLogger(__name__)


def hinge_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Geometric GAN (arXiv 1705.02894) Eq. 6, halved as in VQGAN."""
    return 0.5 * (F.relu(1 - logits_real).mean() + F.relu(1 + logits_fake).mean())


def vanilla_d_loss(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """GAN (arXiv 1406.2661) Eq. 1 on logits, halved as in VQGAN."""
    return 0.5 * (F.softplus(-logits_real).mean() + F.softplus(logits_fake).mean())


DISCRIMINATOR_LOSSES = {"hinge": hinge_d_loss, "vanilla": vanilla_d_loss}
PIXEL_LOSSES = {"l1": lambda x, y: (x - y).abs(), "l2": lambda x, y: (x - y) ** 2}


def from_taming(module: str, name: str) -> Any:
    """A class of taming-transformers. Raises `InputError` naming the extra that installs it."""
    try:
        return getattr(importlib.import_module(f"taming.modules.{module}"), name)
    except ImportError as error:
        raise InputError(
            f"{name} needs the package {error.name}: install the extra with pip install '.[vq]' "
            "(taming-transformers-rom1504, best with --no-deps)"
        ) from None


def chosen(table: Mapping[str, Callable], name: str, argument: str) -> Callable:
    """The entry of a table. Raises `InputError` with the valid names."""
    if name not in table:
        raise InputError(f"unknown {argument} {name!r}: expected {' or '.join(table)}")
    return table[name]


class AdversarialLoss(nn.Module):
    """The common part of LDM's two first-stage losses, which are called twice per batch.

    `perceptual_loss`: a module (or its `{target, params}`) that maps two batches of pictures [b, c, h, w] in -1 .. 1 to
    distances [b, 1, 1, 1], as LPIPS does. This package has none, because the weights of LPIPS may not be redistributed.
    Without it, the perceptual term is left out, with one warning.

    The discriminator is used from step `disc_start` on. Raises `InputError` if taming-transformers is missing.
    """

    def __init__(
        self,
        disc_start: int,
        pixelloss_weight: float = 1.0,
        disc_num_layers: int = 3,
        disc_in_channels: int = 3,
        disc_factor: float = 1.0,
        disc_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        use_actnorm: bool = False,
        disc_conditional: bool = False,
        disc_loss: str = "hinge",
        disc_ndf: int = 64,
        pixel_loss: str = "l1",
        perceptual_loss: nn.Module | Mapping | None = None,
    ):
        super().__init__()
        self.disc_start, self.disc_factor, self.discriminator_weight = disc_start, disc_factor, disc_weight
        self.pixel_weight, self.disc_conditional = pixelloss_weight, disc_conditional
        self.disc_loss = chosen(DISCRIMINATOR_LOSSES, disc_loss, "disc_loss")
        self.pixel_loss = chosen(PIXEL_LOSSES, pixel_loss, "pixel_loss")
        if isinstance(perceptual_loss, Mapping):
            perceptual_loss = instantiate_from_config(perceptual_loss)
        if perceptual_loss is None and perceptual_weight > 0:
            log.warning("no perceptual_loss network was given: the perceptual term is left out (perceptual_weight=0)")
        self.perceptual_weight = perceptual_weight if perceptual_loss is not None else 0.0
        if perceptual_loss is not None:
            self.perceptual_loss = perceptual_loss.eval().requires_grad_(False)
        self.discriminator = from_taming("discriminator.model", "NLayerDiscriminator")(
            input_nc=disc_in_channels, n_layers=disc_num_layers, use_actnorm=use_actnorm, ndf=disc_ndf
        )
        AdversarialLoss.reset_parameters(self)

    def reset_parameters(self) -> None:
        """The random start of the discriminator."""
        self.discriminator.apply(from_taming("discriminator.model", "weights_init"))

    def reconstruction(self, inputs: Tensor, reconstructions: Tensor) -> Tensor:
        """The error of every pixel [b, c, h, w]; the perceptual distance is added to each pixel of a picture."""
        error = self.pixel_weight * self.pixel_loss(inputs, reconstructions)
        if self.perceptual_weight:
            error = error + self.perceptual_weight * self.perceptual_loss(inputs, reconstructions)
        return error

    def active_factor(self, global_step: int) -> float:
        """disc_factor, and 0 before the discriminator starts."""
        return self.disc_factor if global_step >= self.disc_start else 0.0

    def generator_loss(
        self, nll_loss: Tensor, reconstructions: Tensor, cond: Tensor | None, last_layer: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(g_loss, d_weight): the discriminator's negative rating of the reconstructions, and its adaptive weight."""
        g_loss = -self.discriminator(self._with(cond, reconstructions)).mean()
        if not (self.disc_factor > 0 and torch.is_grad_enabled()):
            return g_loss, torch.zeros_like(g_loss)
        # VQGAN (arXiv 2012.09841) Eq. 7
        nll_grad = torch.autograd.grad(nll_loss, last_layer, retain_graph=True)[0]
        g_grad = torch.autograd.grad(g_loss, last_layer, retain_graph=True)[0]
        weight = (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()
        return g_loss, weight * self.discriminator_weight

    def discriminator_loss(
        self, inputs: Tensor, reconstructions: Tensor, cond: Tensor | None, global_step: int, split: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, what to log) for the optimizer of the discriminator."""
        real = self.discriminator(self._with(cond, inputs.detach()))
        fake = self.discriminator(self._with(cond, reconstructions.detach()))
        loss = self.active_factor(global_step) * self.disc_loss(real, fake)
        log = {"disc_loss": loss, "logits_real": real.mean(), "logits_fake": fake.mean()}
        return loss, {f"{split}/{name}": value.detach() for name, value in log.items()}

    def _with(self, cond: Tensor | None, pictures: Tensor) -> Tensor:
        if self.disc_conditional != (cond is not None):
            raise InputError("disc_conditional needs a condition, and only it takes one: they must be given together")
        return pictures if cond is None else torch.cat([pictures, cond], dim=1)
