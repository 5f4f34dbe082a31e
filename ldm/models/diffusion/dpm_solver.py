"""DPM-Solver++ (arXiv 2211.01095), multistep of order 2 with data prediction: one function, and LDM's class over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.guidance import Denoise
from ldm.models.diffusion.sampling import Blend, Draw, LatentSampler, Progress, unchanged


class Level(NamedTuple):
    """A noise level x = alpha x0 + sigma noise of the continuous process; lam = log(alpha / sigma), t for the model."""

    t: float
    alpha: float
    sigma: float
    lam: float


def dpm_solver_pp(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    *,
    blend: Blend = unchanged,
    fix_x0: Callable[[Tensor], Tensor] = unchanged,
    on_step: Callable[[int, int, Tensor, Tensor], Any] = unchanged,
    progress: Progress = iter,
) -> Tensor:
    """From x [b, c, h, w] at levels[0] to a sample at levels[-1]: one call of the model at every level but the last.

    As published, with fewer than 15 steps the last one is of order 1, which is more stable.
    """
    steps = list(zip(levels[:-1], levels[1:], strict=True))
    x0_before, h_before = None, None
    for i, (now, after) in enumerate(progress(steps)):
        x = blend(x, now.alpha**2)
        eps = denoise(x, torch.full((len(x),), now.t, device=x.device))
        x0 = fix_x0((x - now.sigma * eps) / now.alpha)
        h = after.lam - now.lam
        estimate = x0
        if x0_before is not None and not (len(steps) < 15 and i == len(steps) - 1):
            # Algorithm 2, D_i with r_i = h_{i-1} / h_i
            estimate = x0 + h / (2 * h_before) * (x0 - x0_before)
        # Algorithm 2, the update; where the estimate is x0 alone, its first step (which is that of DDIM)
        x = after.sigma / now.sigma * x - after.alpha * math.expm1(-h) * estimate
        x0_before, h_before = x0, h
        on_step(i, len(steps), x, x0)
    return x


def uniform_levels(alphas_cumprod: Tensor, count: int) -> list[Level]:
    """count + 1 levels, uniform in time from 1 to 1/T, where training step n (from 0) stands at time (n + 1) / T.

    Between the training steps log(alpha) is interpolated linearly, DPM-Solver (arXiv 2206.00927) App. D.4.
    """
    log_alphas = 0.5 * alphas_cumprod.detach().cpu().double().log().numpy()
    total = len(log_alphas)
    t = np.linspace(total - 1, 0, count + 1)  # the model's time, (time - 1/T) T
    log_alpha = np.interp(t, np.arange(total), log_alphas)
    sigma = np.sqrt(-np.expm1(2 * log_alpha))
    lam = log_alpha - np.log(sigma)
    return [Level(*row) for row in zip(*(c.tolist() for c in (t, np.exp(log_alpha), sigma, lam)), strict=True)]


class DPMSolverSampler(LatentSampler):
    """LDM's DPM-Solver sampler: deterministic, S calls of the model; good pictures from about 15 steps on."""

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the noise levels. Raises `InputError` for a number of steps outside 1 .. T and if eta is not 0."""
        total = len(self.model.alphas_cumprod)
        if not 1 <= ddim_num_steps <= total:
            raise InputError(f"cannot sample in {ddim_num_steps} steps: expected 1 to {total}")
        if ddim_eta != 0:
            raise InputError(f"DPM-Solver is deterministic, but eta is {ddim_eta}: use eta 0 or the DDIM sampler")
        self.levels = uniform_levels(self.model.alphas_cumprod, ddim_num_steps)

    def run(self, denoise: Denoise, x: Tensor, draw_noise: Draw, *, temperature, noise_dropout, **parts: Any) -> Tensor:
        # Both scale the noise of an update, and this solver adds none.
        return dpm_solver_pp(denoise, x, self.levels, **parts)
