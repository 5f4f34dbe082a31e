"""The prediction of a diffusion model's network: the noise (epsilon), the clean latents (x0) or the velocity (v).

Each choice is an object. At a step with x_t = a x_0 + s noise (a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar)) it gives
the target of training, converts a prediction into the noise or into x_0, and converts its errors into errors of the
noise.
All tensors are [b, c, h, w]; a and s broadcast against them.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from ldm.errors import InputError


class Prediction(Protocol):
    """One choice of what the network predicts."""

    name: str

    def target(self, x_start: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The target of the network for x_t = a x_start + s noise."""

    def to_epsilon(self, predicted: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The noise in x_t that a prediction implies."""

    def to_x0(self, predicted: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """The clean x_0 that a prediction implies."""

    def in_epsilon(self, snr: Tensor) -> Tensor | float:
        """(error of the noise)^2 / (error of the prediction)^2 at signal-to-noise ratios [b] = a^2 / s^2."""

    def elbo_weights(self, betas: np.ndarray, alphas: np.ndarray, alphas_cumprod: np.ndarray,
                     posterior_variance: np.ndarray) -> np.ndarray:  # fmt: skip
        """The weight [T] of the squared error in the variational bound at every step."""


class Epsilon:
    """The noise, as in DDPM (arXiv 2006.11239) and Stable Diffusion 1."""

    name = "eps"

    def target(self, x_start: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return noise

    def to_epsilon(self, predicted: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return predicted

    def to_x0(self, predicted: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return (x_t - s * predicted) / a

    def in_epsilon(self, snr: Tensor) -> Tensor | float:
        return 1.0

    def elbo_weights(self, betas, alphas, alphas_cumprod, posterior_variance) -> np.ndarray:
        # DDPM Eq. 12. The first variance may be 0; the caller replaces its weight.
        with np.errstate(divide="ignore"):
            return betas**2 / (2 * posterior_variance * alphas * (1 - alphas_cumprod))


class X0:
    """The clean latents."""

    name = "x0"

    def target(self, x_start: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return x_start

    def to_epsilon(self, predicted: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return (x_t - a * predicted) / s

    def to_x0(self, predicted: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return predicted

    def in_epsilon(self, snr: Tensor) -> Tensor | float:
        return snr

    def elbo_weights(self, betas, alphas, alphas_cumprod, posterior_variance) -> np.ndarray:
        # As published: 2 - alpha_bar stands where Eq. 8 in terms of x_0 would give 2 (1 - alpha_bar).
        return 0.5 * np.sqrt(alphas_cumprod) / (2 - alphas_cumprod)


class Velocity:
    """v = a noise - s x_0, Progressive Distillation (arXiv 2202.00512) Sec. 4 and App. D; Stable Diffusion 2."""

    name = "v"

    def target(self, x_start: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return a * noise - s * x_start

    def to_epsilon(self, predicted: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return a * predicted + s * x_t

    def to_x0(self, predicted: Tensor, x_t: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return a * x_t - s * predicted

    def in_epsilon(self, snr: Tensor) -> Tensor | float:
        return snr / (snr + 1)

    def elbo_weights(self, betas, alphas, alphas_cumprod, posterior_variance) -> np.ndarray:
        return np.ones_like(betas)  # as published for Stable Diffusion 2


PREDICTIONS: dict[str, Prediction] = {one.name: one for one in (Epsilon(), X0(), Velocity())}


def prediction(name: str) -> Prediction:
    """The prediction that `parameterization` names in YAML. Raises `InputError` for another name."""
    if name not in PREDICTIONS:
        raise InputError(f"parameterization must be one of {', '.join(PREDICTIONS)}, got {name!r}")
    return PREDICTIONS[name]
