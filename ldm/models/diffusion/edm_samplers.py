"""sgm's sampler classes: wrappers of the functions in `sigma_samplers.py` with the published parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.config import instantiate_from_config
from ldm.errors import InputError
from ldm.models.diffusion import sigma_samplers
from ldm.models.diffusion.sampler_parts import NONE, Parts
from ldm.models.diffusion.sigma_samplers import Churn

IDENTITY = {"target": "ldm.models.diffusion.guiders.IdentityGuider"}
Denoiser = Callable[[Tensor, Tensor, Any], Tensor]  # (x, sigma [b], condition) -> estimate of x_0


class BaseDiffusionSampler:
    """A sampler: noise levels (`discretization_config`), their number, guidance, and a `function`.

    `device` is unused; accepted because sgm's YAML files have it. Samples stay on the device of the noise.
    """

    function: Callable[..., Tensor]

    def __init__(
        self,
        discretization_config: Mapping,
        num_steps: int | None = None,
        guider_config: Mapping | None = None,
        verbose: bool = False,
        device: str | None = None,
    ) -> None:
        self.num_steps, self.verbose = num_steps, verbose
        self.discretization = instantiate_from_config(discretization_config)
        self.guider = instantiate_from_config(guider_config or IDENTITY)
        self.options: dict[str, Any] = {}  # further arguments of the function

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        cond: Mapping,
        uc: Mapping | None = None,
        num_steps: int | None = None,
        parts: Parts = NONE,
        draw_noise: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """Samples [b, c, h, w] from N(0, 1) noise x of the same shape, which is not changed.

        `uc` is the unconditional side, by default the condition. `draw_noise` gives further noise.
        Raises `InputError` if no number of steps is given.
        """
        count = self.num_steps if num_steps is None else num_steps
        if count is None:
            raise InputError(f"{type(self).__name__}: give num_steps")
        sigmas = self.discretization(count).tolist()
        uc = cond if uc is None else uc
        if self.verbose and parts.progress is iter:
            parts = replace(parts, progress=partial(tqdm, desc=type(self).__name__))

        def denoise(x: Tensor, sigma: float) -> Tensor:
            levels = x.new_full((len(x),), sigma)
            return self.guider(denoiser(*self.guider.prepare_inputs(x, levels, cond, uc)), levels)

        start = x * math.sqrt(1 + sigmas[0] ** 2)
        draw_noise = draw_noise or (lambda: torch.randn_like(start))
        return type(self).function(denoise, start, sigmas, draw_noise, parts, **self.options)


class EDMSampler(BaseDiffusionSampler):
    """A sampler that may add noise between steps, see `Churn`."""

    def __init__(
        self,
        discretization_config: Mapping,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        **base: Any,
    ) -> None:
        super().__init__(discretization_config, **base)
        self.options = {"churn": Churn(s_churn, s_tmin, s_tmax, s_noise)}


class EulerEDMSampler(EDMSampler):
    """Euler's method."""

    function = sigma_samplers.euler


class HeunEDMSampler(EDMSampler):
    """Heun's method."""

    function = sigma_samplers.heun


class AncestralSampler(BaseDiffusionSampler):
    """A sampler whose steps go below the next level and add noise: the fraction `eta` of it, times `s_noise`."""

    def __init__(self, discretization_config: Mapping, eta: float = 1.0, s_noise: float = 1.0, **base: Any) -> None:
        super().__init__(discretization_config, **base)
        self.options = {"eta": eta, "s_noise": s_noise}


class EulerAncestralSampler(AncestralSampler):
    """Euler's method in ancestral steps."""

    function = sigma_samplers.euler_ancestral


class DPMPP2SAncestralSampler(AncestralSampler):
    """DPM-Solver++(2S) in ancestral steps."""

    function = sigma_samplers.dpmpp_2s_ancestral


class DPMPP2MSampler(BaseDiffusionSampler):
    """DPM-Solver++(2M)."""

    function = sigma_samplers.dpmpp_2m


class LinearMultistepSampler(BaseDiffusionSampler):
    """Linear multistep of an order."""

    function = sigma_samplers.lms

    def __init__(self, discretization_config: Mapping, order: int = 4, **base: Any) -> None:
        super().__init__(discretization_config, **base)
        self.options = {"order": order}
