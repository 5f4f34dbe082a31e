"""The training loss of latent diffusion as functions of tensors."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from ldm.errors import InputError


def simple_loss(
    pred: Tensor,
    target: Tensor,
    kind: str | Callable[[Tensor, Tensor], Tensor] = "l2",
    mask: Tensor | None = None,
    mask_as_published: bool = False,
) -> Tensor:
    """The error of every sample, [b, c, h, w] twice -> [b]: the mean over c, h, w, or over places where `mask` is 1.

    DDPM (arXiv 2006.11239) Eq. 14 for `l2`; `l1` takes absolute values; a function
    gives the errors [b, c, h, w] itself. Raises `InputError` for another kind.

    The mask is [b, 1, h, w] (Custom Diffusion, arXiv 2212.04488, section 3.2); values between 0 and 1 are weights. By
    default a mask of ones changes nothing, so losses with and without masks are comparable. The published code divides
    the sum over all channels by the number of places only, which gives c times as much: `mask_as_published`.
    """
    measures = {"l2": F.mse_loss, "l1": F.l1_loss}
    if callable(kind):
        errors = kind(pred, target)
    elif kind in measures:
        errors = measures[kind](pred, target, reduction="none")
    else:
        raise InputError(f"unknown loss_type {kind!r}: expected l1 or l2")
    if mask is None:
        return errors.flatten(1).mean(1)
    counted = mask if mask_as_published else mask.expand_as(errors)
    return (errors * mask).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1e-6)  # a crop may be all black


def diffusion_loss(
    per_sample: Tensor,
    t: Tensor,
    logvar: Tensor,
    lvlb_weights: Tensor,
    l_simple_weight: float | Tensor = 1.0,
    elbo_weight: float = 0.0,
    learn_logvar: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(total, what to log) from the errors [b] at the steps t [b]; logvar and lvlb_weights are [T].

    `l_simple_weight`: one for all samples, or one for each, [b].

    The log has loss_simple, loss_vlb and loss, with `learn_logvar` loss_gamma and logvar too.
    """
    logvar_t = logvar[t]
    # A Gaussian likelihood with variance exp(logvar_t); with logvar 0 it is DDPM (arXiv 2006.11239) Eq. 14
    weighted = per_sample / logvar_t.exp() + logvar_t
    # DDPM Eq. 12
    loss_vlb = (lvlb_weights[t] * per_sample).mean()
    total = (l_simple_weight * weighted).mean() + elbo_weight * loss_vlb

    log = {"loss_simple": per_sample.mean(), "loss_vlb": loss_vlb, "loss": total}
    if learn_logvar:
        log |= {"loss_gamma": weighted.mean(), "logvar": logvar.mean()}
    return total, log


def dreambooth_loss(loss: Tensor, loss_reg: Tensor, reg_weight: float = 1.0) -> Tensor:
    """Instance loss plus prior preservation on class pictures, DreamBooth (arXiv 2208.12242) Eq. 2."""
    return loss + reg_weight * loss_reg
