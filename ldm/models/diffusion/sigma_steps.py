"""Adapts the samplers of `sigma_samplers.py` to the table in `samplers.py`, i.e. to denoise(x, t) -> noise.

There x = alpha x_0 + s noise with alpha^2 + s^2 = 1. Here it is divided by alpha: x_0 + sigma noise with
sigma = s / alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.discretizer import evenly_spaced
from ldm.models.diffusion.sampler_parts import NONE, Draw, Parts, unchanged
from ldm.modules.diffusionmodules.util import make_ddim_timesteps

RHO = 7.0  # of Karras et al. (arXiv 2206.00364), section 3


@dataclass(frozen=True)
class SigmaSteps:
    """n + 1 descending levels, the last one 0, and further arguments of the sampler; `log_alphas` [T] of training."""

    sigmas: list[float]
    log_alphas: np.ndarray
    options: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def time(self, sigma: float) -> float:
        """The (fractional) time step of a level; log(alpha) is interpolated between the steps of training."""
        log_alpha = -0.5 * math.log1p(sigma**2)
        total = len(self.log_alphas)
        time = float(np.interp(log_alpha, self.log_alphas[::-1], np.arange(total)[::-1]))
        return float(round(time)) if abs(time - round(time)) < 1e-3 else time


def uniform(log_alphas: np.ndarray, count: int) -> list[float]:
    """The levels of time steps that are spread evenly from the last one, as in sgm, without step 0."""
    return _sigmas(log_alphas)[evenly_spaced(count, len(log_alphas))].tolist()


def trailing(log_alphas: np.ndarray, count: int) -> list[float]:
    """The levels of the last step of each of `count` equal parts (arXiv 2305.08891, section 3.3)."""
    times = make_ddim_timesteps("trailing", count, len(log_alphas))
    return _sigmas(log_alphas)[times[::-1]].tolist()


def karras(log_alphas: np.ndarray, count: int) -> list[float]:
    """Levels between the first and the last level of training, dense at the end (arXiv 2206.00364, eq. 5)."""
    sigmas = _sigmas(log_alphas)
    low, high = sigmas[0] ** (1 / RHO), sigmas[-1] ** (1 / RHO)
    return (np.linspace(high, low, count) ** RHO).tolist()


SPACINGS: dict[str, Callable[[np.ndarray, int], list[float]]] = {
    "uniform": uniform,
    "trailing": trailing,
    "karras": karras,
}


def sigma_steps(alphas_cumprod: Tensor, count: int, eta: float = 0.0, spacing: str = "uniform") -> SigmaSteps:
    """The levels of a deterministic sampler for alpha_bar [T] of training.

    Raises `InputError` for a count outside 1 .. T and for an unknown spacing.
    """
    if spacing not in SPACINGS:
        raise InputError(f"unknown spacing {spacing!r} for this sampler: expected {', '.join(SPACINGS)}")
    total = len(alphas_cumprod)
    if not 1 <= count <= total:
        raise InputError(f"cannot sample in {count} steps: expected 1 to {total}, the steps the model was trained with")
    log_alphas = 0.5 * alphas_cumprod.detach().cpu().double().log().numpy()
    return SigmaSteps([*SPACINGS[spacing](log_alphas, count), 0.0], log_alphas)


def ancestral_steps(alphas_cumprod: Tensor, count: int, eta: float = 1.0, spacing: str = "uniform") -> SigmaSteps:
    """The levels of an ancestral sampler, which adds `eta` of the noise of DDPM. Raises `InputError`, see above."""
    if not 0 <= eta <= 1:
        raise InputError(f"eta is {eta}: expected 0 (deterministic) to 1 (the noise of DDPM)")
    steps = sigma_steps(alphas_cumprod, count, spacing=spacing)
    return SigmaSteps(steps.sigmas, steps.log_alphas, {"eta": eta})


def over_noise(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Convert a sampler over D(x, sigma) into one over denoise(x, t) -> noise, which starts from N(0, 1) noise."""

    def sample(
        denoise: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        steps: SigmaSteps,
        draw_noise: Draw | None = None,
        parts: Parts = NONE,
    ) -> Tensor:
        def x0_of(x: Tensor, sigma: float) -> Tensor:
            return x - sigma * denoise(x * alpha_of(sigma), torch.full((len(x),), steps.time(sigma), device=x.device))

        def blended(x: Tensor, sigma: float) -> Tensor:
            alpha = alpha_of(sigma)
            return parts.blend(x * alpha, alpha**2) / alpha

        def told(i: int, total: int, x: Tensor, x0: Tensor) -> None:
            parts.on_step(i, total, x * alpha_of(steps.sigmas[i + 1]), x0)

        own = replace(parts, blend=unchanged if parts.blend is unchanged else blended, on_step=told)
        return function(x0_of, x / alpha_of(steps.sigmas[0]), steps.sigmas, draw_noise, own, **steps.options)

    return sample


def alpha_of(sigma: float) -> float:
    """alpha of the level sigma = s / alpha."""
    return 1 / math.sqrt(1 + sigma**2)


def _sigmas(log_alphas: np.ndarray) -> np.ndarray:
    return np.sqrt(np.expm1(-2 * log_alphas))
