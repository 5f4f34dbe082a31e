"""The constants of the diffusion process, which a `DDPM` registers as buffers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.prediction import PREDICTIONS, Prediction


def ddpm_buffers(
    betas: np.ndarray, v_posterior: float = 0.0, prediction: Prediction = PREDICTIONS["eps"]
) -> dict[str, Tensor]:
    """Every constant of the forward process and its posterior by buffer name: float32, [T] each.

    betas: float64 [T]. v_posterior: weight of the upper bound beta in the posterior variance; 0 is the true variance.
    All but `lvlb_weights` belong to the state dict of released checkpoints.
    Raises `InputError` for betas outside (0, 1).
    """
    betas = np.asarray(betas, dtype=np.float64)
    if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
        raise InputError("the betas of the noise schedule must lie between 0 and 1; check linear_start and linear_end")
    alphas = 1 - betas
    alphas_cumprod = np.cumprod(alphas)
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    # DDPM (arXiv 2006.11239) Eq. 7 and, as its upper bound, sigma_t^2 = beta_t of Sec. 3.2
    posterior_variance = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod) * betas
    posterior_variance = (1 - v_posterior) * posterior_variance + v_posterior * betas

    buffers = {
        "betas": betas,
        "alphas_cumprod": alphas_cumprod,
        "alphas_cumprod_prev": alphas_cumprod_prev,
        # q(x_t | x_0), Eq. 4
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod),
        "log_one_minus_alphas_cumprod": np.log(1 - alphas_cumprod),
        # x_0 from x_t and the noise: Eq. 4 solved for x_0, as above Eq. 9
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod - 1),
        # q(x_{t-1} | x_t, x_0), Eqs. 6 and 7; the variance is 0 at the first step, so its logarithm is clipped
        "posterior_variance": posterior_variance,
        "posterior_log_variance_clipped": np.log(np.maximum(posterior_variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod),
        "posterior_mean_coef2": (1 - alphas_cumprod_prev) * np.sqrt(alphas) / (1 - alphas_cumprod),
        "lvlb_weights": _lvlb_weights(prediction, betas, alphas, alphas_cumprod, posterior_variance),
    }
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in buffers.items()}


def zero_terminal(betas: np.ndarray) -> np.ndarray:
    """Betas [T] with the same first step and (nearly) no signal at the last step.

    Lin et al. (arXiv 2305.08891), Algorithm 1. The last alpha_bar is 2^-24 instead of 0, so that division by its root
    is possible; the level is sigma = 4096.
    """
    root = np.sqrt(np.cumprod(1 - np.asarray(betas, dtype=np.float64)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alphas_cumprod = np.maximum(root**2, 2.0**-24)
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])


def _lvlb_weights(prediction: Prediction, betas, alphas, alphas_cumprod, posterior_variance) -> np.ndarray:
    """The weight of the squared error in the variational bound at every step.

    As published, it is computed from the float32 buffers, so 1 - alpha_bar has rounding errors at the first steps.
    """
    betas, alphas, alphas_cumprod, posterior_variance = (
        values.astype(np.float32).astype(np.float64) for values in (betas, alphas, alphas_cumprod, posterior_variance)
    )
    weights = prediction.elbo_weights(betas, alphas, alphas_cumprod, posterior_variance)
    weights[:1] = weights[1:2]
    return weights
