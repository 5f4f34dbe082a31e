"""Samplers, each one a function over denoise(x, t), and their table.

A sampler takes x [b, c, h, w] at the noise level of the first step, the steps in the order in which it visits them,
and `draw_noise`, which gives N(0, 1) noise of the shape of x. denoise(x, t [b]) gives the predicted noise. Of the
`Parts`, `blend` takes x and its alpha_bar.
`sigma` means one thing here: the standard deviation of the noise in x = alpha x0 + sigma noise, alpha^2 = alpha_bar.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion import sigma_samplers
from ldm.models.diffusion.guidance import Denoise
from ldm.models.diffusion.sampler_parts import NONE, Blend, Draw, Parts
from ldm.models.diffusion.sigma_steps import ancestral_steps, over_noise, sigma_steps
from ldm.modules.diffusionmodules.util import make_ddim_sampling_parameters, make_ddim_timesteps

Generators = torch.Generator | Sequence[torch.Generator] | None


# --- what a sampler is given ------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One update of DDIM or PLMS, as host numbers, so that the loop never waits for the device."""

    t: int
    alpha_bar: float
    alpha_bar_prev: float  # where the update ends
    noise_std: float  # of the noise that the update adds: sigma_t of DDIM (arXiv 2010.02502) Eq. 16


class Level(NamedTuple):
    """A noise level x = alpha x0 + sigma noise of the continuous process; lam = log(alpha / sigma), t for the model."""

    t: float
    alpha: float
    sigma: float
    lam: float


def draw(shape: Sequence[int], device: torch.device | str, generator: Generators = None) -> Tensor:
    """N(0, 1) noise [b, ...] on `device`, float32.

    It is drawn on the CPU from the global generator, so a seed means the same on every device. With a generator, it
    comes from that generator; with a list of one generator per sample, samples do not depend on their batch. Raises
    `InputError` if the list does not have one generator per sample.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise InputError(f"{len(generator)} generators for a batch of {shape[0]}: expected one per sample")
        return torch.stack([draw(shape[1:], device, one) for one in generator])
    source = "cpu" if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=source).to(device, non_blocking=True)


def keep_known(x0: Tensor, mask: Tensor, draw_noise: Draw) -> Blend:
    """Inpainting with a model that was not trained for it. Returns blend(x [b, c, h, w], alpha_bar).

    Before every call of the model, the places where `mask` is 1 are replaced by `x0`, noised to the current level:
    RePaint (arXiv 2201.09865) Eq. 8.
    """

    def blend(x: Tensor, alpha_bar: float) -> Tensor:
        # DDPM (arXiv 2006.11239) Eq. 4
        known = alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * draw_noise()
        return known * mask + (1 - mask) * x

    return blend


# --- which steps are visited ------------------------------------------------------------------------------------------


def ddim_steps(alphas_cumprod: Tensor, count: int, eta: float = 0.0, spacing: str = "uniform") -> list[Step]:
    """The steps of DDIM and PLMS, descending, for alpha_bar [T] of training. Raises `InputError` for a bad count."""
    alphas_cumprod = alphas_cumprod.detach().cpu().float()
    times = make_ddim_timesteps(spacing, count, len(alphas_cumprod))
    noise_std, alpha_bar, alpha_bar_prev = make_ddim_sampling_parameters(alphas_cumprod, times, eta)
    columns = times, alpha_bar, alpha_bar_prev, noise_std
    return [Step(*row) for row in zip(*(column.tolist() for column in columns), strict=True)][::-1]


def uniform_levels(alphas_cumprod: Tensor, count: int, eta: float = 0.0, spacing: str = "uniform") -> list[Level]:
    """count + 1 levels, uniform in time from 1 to 1/T, where training step n (from 0) stands at time (n + 1) / T.

    Between the training steps log(alpha) is interpolated linearly, DPM-Solver (arXiv 2206.00927) App. D.4.
    Raises `InputError` for a count outside 1 .. T and for another spacing.
    """
    if spacing != "uniform":
        raise InputError(f"DPM-Solver spaces its steps uniformly, got the spacing {spacing!r}; use dpmpp_2m for others")
    log_alphas = 0.5 * alphas_cumprod.detach().cpu().double().log().numpy()
    total = len(log_alphas)
    if not 1 <= count <= total:
        raise InputError(f"cannot sample in {count} steps: expected 1 to {total}")
    t = np.linspace(total - 1, 0, count + 1)  # the model's time, (time - 1/T) T
    log_alpha = np.interp(t, np.arange(total), log_alphas)
    sigma = np.sqrt(-np.expm1(2 * log_alpha))
    lam = log_alpha - np.log(sigma)
    return [Level(*row) for row in zip(*(c.tolist() for c in (t, np.exp(log_alpha), sigma, lam)), strict=True)]


# --- the samplers -----------------------------------------------------------------------------------------------------


def ddim(denoise: Denoise, x: Tensor, steps: Sequence[Step], draw_noise: Draw, parts: Parts = NONE) -> Tensor:
    """DDIM (arXiv 2010.02502).

    Noise is drawn in every update, even if none is added, so that a seed means the same for every eta.
    """
    for i, (t, alpha_bar, alpha_bar_prev, noise_std) in enumerate(parts.progress(steps)):
        x = parts.blend(x, alpha_bar)
        eps = denoise(x, torch.full((len(x),), t, device=x.device))
        # Eq. 12: the predicted x0, the direction pointing to x_t, random noise
        pred_x0 = parts.fix_x0((x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5)
        direction = (1 - alpha_bar_prev - noise_std**2) ** 0.5 * eps
        x = alpha_bar_prev**0.5 * pred_x0 + direction + noise_std * draw_noise()
        parts.on_step(i, len(steps), x, pred_x0)
    return x


def plms(denoise: Denoise, x: Tensor, steps: Sequence[Step], draw_noise: Draw, parts: Parts = NONE) -> Tensor:
    """PLMS, the pseudo linear multi-step sampler of PNDM (arXiv 2202.09778): deterministic, one call more than steps.

    As published, noise is drawn but not used in every update, so seeds mean the same as in DDIM.
    """

    def transfer(x: Tensor, step: Step, eps: Tensor) -> tuple[Tensor, Tensor]:
        # Eq. 11 in the form of DDIM (arXiv 2010.02502) Eq. 12 without noise
        draw_noise()
        pred_x0 = parts.fix_x0((x - (1 - step.alpha_bar) ** 0.5 * eps) / step.alpha_bar**0.5)
        return step.alpha_bar_prev**0.5 * pred_x0 + (1 - step.alpha_bar_prev) ** 0.5 * eps, pred_x0

    def at(t: int) -> Tensor:
        return torch.full((len(x),), t, device=x.device)

    before: list[Tensor] = []  # the model's last three predictions, newest first
    for i, step in enumerate(parts.progress(steps)):
        x = parts.blend(x, step.alpha_bar)
        eps = denoise(x, at(step.t))
        if len(before) == 0:
            # As published: pseudo improved Euler with two calls instead of the paper's Runge-Kutta start (Eq. 13)
            x_ahead, _ = transfer(x, step, eps)
            best = (eps + denoise(x_ahead, at(steps[min(i + 1, len(steps) - 1)].t))) / 2
        elif len(before) == 1:
            best = (3 * eps - before[0]) / 2  # Adams-Bashforth of order 2
        elif len(before) == 2:
            best = (23 * eps - 16 * before[0] + 5 * before[1]) / 12  # of order 3
        else:
            best = (55 * eps - 59 * before[0] + 37 * before[1] - 9 * before[2]) / 24  # of order 4: Eq. 12
        x, pred_x0 = transfer(x, step, best)
        before = [eps, *before[:2]]
        parts.on_step(i, len(steps), x, pred_x0)
    return x


def dpm_solver_pp(
    denoise: Denoise, x: Tensor, steps: Sequence[Level], draw_noise: Draw | None = None, parts: Parts = NONE
) -> Tensor:
    """DPM-Solver++ (arXiv 2211.01095), multistep of order 2 with data prediction: deterministic, draws no noise.

    `steps` are noise levels: one call of the model at each but the last, where the sample is. As published, with fewer
    than 15 updates the last one is of order 1, which is more stable.
    """
    updates = list(zip(steps[:-1], steps[1:], strict=True))
    x0_before, h_before = None, None
    for i, (now, after) in enumerate(parts.progress(updates)):
        x = parts.blend(x, now.alpha**2)
        eps = denoise(x, torch.full((len(x),), now.t, device=x.device))
        x0 = parts.fix_x0((x - now.sigma * eps) / now.alpha)
        h = after.lam - now.lam
        estimate = x0
        if x0_before is not None and not (len(updates) < 15 and i == len(updates) - 1):
            # Algorithm 2, D_i with r_i = h_{i-1} / h_i
            estimate = x0 + h / (2 * h_before) * (x0 - x0_before)
        # Algorithm 2, the update; where the estimate is x0 alone, its first step (which is that of DDIM)
        x = after.sigma / now.sigma * x - after.alpha * math.expm1(-h) * estimate
        x0_before, h_before = x0, h
        parts.on_step(i, len(updates), x, x0)
    return x


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampler:
    """A row: the function, its steps for (alphas_cumprod [T], count, eta), and whether eta has an effect.

    usual_eta: the default eta
    """

    title: str
    function: Callable[..., Tensor]
    schedule: Callable[..., Any]
    has_eta: bool = False
    usual_eta: float = 0.0

    def steps(self, alphas_cumprod: Tensor, count: int, eta: float | None = None, **spacing: Any) -> Any:
        """The steps to visit. Raises `InputError` for a count out of range and for an eta that has no effect."""
        eta = self.usual_eta if eta is None else eta
        if eta and not self.has_eta:
            raise InputError(f"{self.title} is deterministic, but eta is {eta}: use eta 0 or the DDIM sampler")
        return self.schedule(alphas_cumprod, count, eta, **spacing)


SAMPLERS = {
    "ddim": Sampler("DDIM", ddim, ddim_steps, has_eta=True),
    "plms": Sampler("PLMS", plms, ddim_steps),
    "dpm_solver": Sampler("DPM-Solver", dpm_solver_pp, uniform_levels),
    "euler": Sampler("Euler", over_noise(sigma_samplers.euler), sigma_steps),
    "euler_a": Sampler("Euler ancestral", over_noise(sigma_samplers.euler_ancestral), ancestral_steps, True, 1.0),
    "heun": Sampler("Heun", over_noise(sigma_samplers.heun), sigma_steps),
    "dpmpp_2m": Sampler("DPM++ 2M", over_noise(sigma_samplers.dpmpp_2m), sigma_steps),
    "dpmpp_2s_a": Sampler("DPM++ 2S a", over_noise(sigma_samplers.dpmpp_2s_ancestral), ancestral_steps, True, 1.0),
    "lms": Sampler("LMS", over_noise(sigma_samplers.lms), sigma_steps),
}


def sampler(name: str) -> Sampler:
    """The row of a sampler. Raises `InputError` for an unknown name."""
    if name not in SAMPLERS:
        raise InputError(f"unknown sampler {name!r}: expected {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
