"""The `loss` section of a config: what a training step draws and how it weights errors.

Measures of errors, weights of time steps and distributions of time steps are rows of tables. `Objective.noise` makes
the noise. The defaults give exactly the results of DDPM (arXiv 2006.11239).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm import schema
from ldm.errors import InputError
from ldm.models.diffusion.draws import Draws
from ldm.models.diffusion.prediction import Prediction

# --- weights of the squared error of epsilon [b] at signal-to-noise ratios [b]; `Prediction.in_epsilon` converts them


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """Min-SNR (arXiv 2303.09556), section 3.4: min(SNR, gamma) / SNR."""
    return snr.clamp(max=gamma) / snr


def soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """The smooth form of Min-SNR, gamma / (SNR + gamma) (arXiv 2401.11605)."""
    return gamma / (snr + gamma)


def debiased(snr: Tensor, gamma: float) -> Tensor:
    """Debiased training (arXiv 2310.08442): 1 / sqrt(SNR). SNR counts as 1000 at most, as in sd-scripts."""
    return snr.clamp(max=1000).rsqrt()


WEIGHTINGS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "debiased": debiased,
}

# --- measures of errors: prediction, target and c [b, 1, ...] -> errors of the same shape


def pseudo_huber(predicted: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """2 c (sqrt(d^2 + c^2) - c) (arXiv 2403.16728): d^2 for small d, 2 c |d| for large ones."""
    return 2 * c * (((predicted - target) ** 2 + c**2).sqrt() - c)


def smooth_l1(predicted: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """2 (sqrt(d^2 + c^2) - c): `pseudo_huber` / c, whose slope for large d does not depend on c."""
    return 2 * (((predicted - target) ** 2 + c**2).sqrt() - c)


MEASURES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "l2": lambda predicted, target, c: F.mse_loss(predicted, target, reduction="none"),
    "l1": lambda predicted, target, c: F.l1_loss(predicted, target, reduction="none"),
    "huber": pseudo_huber,
    "smooth_l1": smooth_l1,
}

# Schedules of c, which falls from about 1 to `huber_c` over time steps t in 0 .. T - 1 (arXiv 2403.16728).
HUBER_SCHEDULES: dict[str, Callable[[Tensor, int, Tensor, float], Tensor]] = {
    "constant": lambda t, count, snr, c: torch.full_like(snr, c),
    "exponential": lambda t, count, snr, c: torch.exp(math.log(c) * t.to(snr.dtype) / count),
    "snr": lambda t, count, snr, c: (1 - c) / (1 + snr.rsqrt()) ** 2 + c,
}

# --- distributions of time steps: fractions u [b] in [0, 1) of the allowed range


def logit_normal(draws: Draws, pictures: int, mean: float, std: float) -> Tensor:
    """u = sigmoid(mean + std n) with normal n (arXiv 2403.03206, eq. 19)."""
    return torch.sigmoid(mean + std * draws.normal((pictures,)))


# --- the objective


class Objective:
    """The `loss` section of a config. See `ldm.schema.Loss` for its keys.

    Raises `InputError` for an invalid section.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None, prediction: Prediction | None = None) -> None:
        schema.check_part(schema.Loss, dict(settings or {}), "loss")
        self.settings = schema.Loss(**(settings or {}))
        self.prediction = prediction
        first, last = self.settings.timesteps or (0, None)
        if last is not None and not first < last:
            raise InputError(f"loss.timesteps must be [first, end] with first < end, got [{first}, {last}]")
        weights = self.settings.prior_weights or []
        if any(len(pair) != 2 for pair in weights) or weights != sorted(weights, key=lambda pair: pair[0]):
            raise InputError(f"loss.prior_weights must be pairs [step, weight] in the order of steps, got {weights}")

    def range_of(self, count: int) -> tuple[int, int]:
        """The first time step in use and the one after the last, of `count`. Raises `InputError`."""
        first, end = self.settings.timesteps or (0, count)
        end = count if end is None else end
        if end > count:
            raise InputError(f"loss.timesteps ends at {end}, but the model has {count} time steps")
        return first, end

    def steps(self, draws: Draws, count: int, pictures: int, device: torch.device) -> Tensor:
        """Time steps [b] of a training batch."""
        first, end = self.range_of(count)
        if self.settings.timestep_sampling == "uniform":
            steps = draws.steps(end - first, pictures, device)
            return steps + first if first else steps
        u = logit_normal(draws, pictures, self.settings.logit_mean, self.settings.logit_std)
        return (first + (u * (end - first)).floor().clamp(max=end - first - 1)).long().to(device)

    def noise(self, draws: Draws, like: Tensor) -> Tensor:
        """The noise [b, c, h, w] that a step adds and that is its target."""
        noise = draws.normal_like(like)
        if self.settings.pyramid_noise:
            noise = pyramid(noise, draws, self.settings.pyramid_noise, self.settings.pyramid_levels)
        if self.settings.noise_offset:  # https://www.crosslabs.org/blog/diffusion-with-offset-noise
            noise = noise + self.settings.noise_offset * draws.normal_like(like[:, :, :1, :1])
        return noise

    def added(self, draws: Draws, noise: Tensor) -> Tensor:
        """The noise in x_t for a target `noise`; input perturbation (arXiv 2301.11706, algorithm 1) adds some."""
        if not self.settings.input_perturbation:
            return noise
        return noise + self.settings.input_perturbation * draws.normal_like(noise)

    def errors(self, predicted: Tensor, target: Tensor, t: Tensor, snr: Tensor, count: int, usual: str) -> Tensor:
        """The errors of single values, in the shape of `predicted`; `usual` is the default measure."""
        kind = self.settings.type or usual
        c = HUBER_SCHEDULES[self.settings.huber_schedule](t, count, snr, self.settings.huber_c)
        return MEASURES[kind](predicted, target, c.view(-1, *(1,) * (predicted.dim() - 1)))

    def weight(self, snr: Tensor) -> Tensor | float:
        """The weights of errors at signal-to-noise ratios [b]: [b], or 1."""
        if self.settings.weighting == "none":
            return 1.0
        return WEIGHTINGS[self.settings.weighting](snr, self.settings.gamma) * self.prediction.in_epsilon(snr)

    def prior_weight(self, step: int, usual: float) -> float:
        """The weight of the class pictures in a step, interpolated linearly between the pairs of `prior_weights`."""
        pairs = self.settings.prior_weights
        return float(np.interp(step, *zip(*pairs, strict=True))) if pairs else usual


def pyramid(noise: Tensor, draws: Draws, discount: float, levels: int) -> Tensor:
    """Multi-resolution noise (Whitaker, 2023): noise + sum of discount^i times noise at a 2^i coarser resolution.

    Every sample is scaled back to unit variance.
    """
    size = noise.shape[2:]
    for level in range(1, levels + 1):
        coarse = [max(1, side // 2**level) for side in size]
        small = draws.normal_like(noise[:, :, : coarse[0], : coarse[1]])
        noise = noise + discount**level * F.interpolate(small, size=tuple(size), mode="bilinear")
        if max(coarse) == 1:
            break
    return noise / noise.flatten(1).std(1).view(-1, *(1,) * (noise.dim() - 1))
