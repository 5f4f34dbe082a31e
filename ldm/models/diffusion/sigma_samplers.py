"""Samplers over D(x, sigma), the estimate of x_0 in x = x_0 + sigma noise (Karras et al., arXiv 2206.00364).

Each one is a function. `denoise(x [b, c, h, w], sigma)` is D. `sigmas` are n + 1 descending host numbers, the last one
is 0. `draw_noise` gives N(0, 1) noise of the shape of x. The optional `Parts` are those of `samplers.py`;
`blend(x, sigma)` is called once per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldm.models.diffusion.sampler_parts import NONE, Draw, Parts

Denoise = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Churn:
    """Noise that is added before a step, Algorithm 2 of the paper: `s_churn` in all, between `s_tmin` and `s_tmax`.

    `s_noise` multiplies its standard deviation.
    """

    s_churn: float = 0.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __call__(self, x: Tensor, sigma: float, count: int, draw_noise: Draw) -> tuple[Tensor, float]:
        """x and sigma with the noise, lines 4 to 6; unchanged if there is none. count: number of steps."""
        gamma = min(self.s_churn / count, math.sqrt(2) - 1) if self.s_tmin <= sigma <= self.s_tmax else 0.0
        if gamma <= 0:
            return x, sigma
        raised = sigma * (1 + gamma)
        return x + math.sqrt(raised**2 - sigma**2) * self.s_noise * draw_noise(), raised


NO_CHURN = Churn()


def levels(parts: Parts, sigmas: Sequence[float]) -> Iterable[tuple[int, float, float]]:
    """(number, sigma, next sigma) of each step."""
    return parts.progress(list(zip(range(len(sigmas)), sigmas[:-1], sigmas[1:], strict=False)))


def euler(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], draw_noise: Draw, parts: Parts = NONE, churn: Churn = NO_CHURN
) -> Tensor:
    """Euler's method, Algorithm 2 of the paper without its correction. Noise is drawn only in steps with churn."""
    for i, sigma, after in levels(parts, sigmas):
        x, sigma = churn(parts.blend(x, sigma), sigma, len(sigmas) - 1, draw_noise)
        x0 = parts.fix_x0(denoise(x, sigma))
        x = x + (after - sigma) * slope(x, x0, sigma)
        parts.on_step(i, len(sigmas) - 1, x, x0)
    return x


def heun(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], draw_noise: Draw, parts: Parts = NONE, churn: Churn = NO_CHURN
) -> Tensor:
    """Heun's method, Algorithm 2 of the paper: two calls of the model in each step except the last."""
    for i, sigma, after in levels(parts, sigmas):
        x, sigma = churn(parts.blend(x, sigma), sigma, len(sigmas) - 1, draw_noise)
        x0 = parts.fix_x0(denoise(x, sigma))
        d = slope(x, x0, sigma)
        ahead = x + (after - sigma) * d
        if after > 0:
            d = (d + slope(ahead, parts.fix_x0(denoise(ahead, after)), after)) / 2
        x = x + (after - sigma) * d
        parts.on_step(i, len(sigmas) - 1, x, x0)
    return x


def euler_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], draw_noise: Draw, parts: Parts = NONE,
    eta: float = 1.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """Euler's method to a level below the next one, then noise up to it. As published, every step draws noise."""
    for i, sigma, after in levels(parts, sigmas):
        x = parts.blend(x, sigma)
        down, up = ancestral(sigma, after, eta)
        x0 = parts.fix_x0(denoise(x, sigma))
        x = with_noise(x + (down - sigma) * slope(x, x0, sigma), s_noise * up, draw_noise)
        parts.on_step(i, len(sigmas) - 1, x, x0)
    return x


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], draw_noise: Draw, parts: Parts = NONE,
    eta: float = 1.0, s_noise: float = 1.0,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2S) (arXiv 2211.01095), Algorithm 1 with r = 1/2, in ancestral steps; the last one is Euler's."""
    for i, sigma, after in levels(parts, sigmas):
        x = parts.blend(x, sigma)
        down, up = ancestral(sigma, after, eta)
        x0 = estimate = parts.fix_x0(denoise(x, sigma))
        if down > 0:
            middle = math.sqrt(sigma * down)  # half the way in log(sigma)
            estimate = parts.fix_x0(denoise(towards(x, x0, sigma, middle), middle))
        x = with_noise(towards(x, estimate, sigma, down), s_noise * up, draw_noise)
        parts.on_step(i, len(sigmas) - 1, x, x0)
    return x


def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Sequence[float], draw_noise: Draw | None = None, parts: Parts = NONE
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095), Algorithm 2: order 2, one call of the model; the last step is Euler's."""
    before, sigma_before = None, 0.0
    for i, sigma, after in levels(parts, sigmas):
        x = parts.blend(x, sigma)
        x0 = estimate = parts.fix_x0(denoise(x, sigma))
        if before is not None and after > 0:
            # D_i of the algorithm with r = h_before / h
            r = math.log(sigma_before / sigma) / math.log(sigma / after)
            estimate = x0 + (x0 - before) / (2 * r)
        x = towards(x, estimate, sigma, after)
        before, sigma_before = x0, sigma
        parts.on_step(i, len(sigmas) - 1, x, x0)
    return x


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Sequence[float],
    draw_noise: Draw | None = None,
    parts: Parts = NONE,
    order: int = 4,
) -> Tensor:
    """Linear multistep: integrates the polynomial through the last `order` slopes (Adams-Bashforth, uneven steps)."""
    slopes: list[Tensor] = []  # newest first
    for i, sigma, after in levels(parts, sigmas):
        x = parts.blend(x, sigma)
        x0 = parts.fix_x0(denoise(x, sigma))
        slopes = [slope(x, x0, sigma), *slopes[: order - 1]]
        places = [sigmas[i - k] for k in range(len(slopes))]
        x = x + sum(integral(places, k, sigma, after) * d for k, d in enumerate(slopes))
        parts.on_step(i, len(sigmas) - 1, x, x0)
    return x


# --- pieces of steps


def slope(x: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """dx/dsigma of the probability flow, eq. 3 of the paper with sigma(t) = t."""
    return (x - x0) / sigma


def towards(x: Tensor, x0: Tensor, sigma: float, after: float) -> Tensor:
    """x moved from sigma to a lower level for a given x_0: a step of DPM-Solver++ of order 1."""
    return after / sigma * x + (1 - after / sigma) * x0


def ancestral(sigma: float, after: float, eta: float) -> tuple[float, float]:
    """(lower level, standard deviation of the noise from there to the next level): DDIM's eta for sigmas."""
    up = min(after, eta * math.sqrt(after**2 * (sigma**2 - after**2) / sigma**2))
    return math.sqrt(after**2 - up**2), up


def with_noise(x: Tensor, std: float, draw_noise: Draw) -> Tensor:
    """x with noise, which is drawn even if its standard deviation is 0."""
    noise = draw_noise()
    return x + std * noise if std > 0 else x


def integral(places: Sequence[float], k: int, start: float, end: float) -> float:
    """The integral of the Lagrange polynomial that is 1 at places[k] and 0 at the others."""
    others = [place for j, place in enumerate(places) if j != k]
    polynomial = np.poly1d(others, r=True) / np.prod([places[k] - place for place in others])
    whole = polynomial.integ()
    return float(whole(end) - whole(start))
