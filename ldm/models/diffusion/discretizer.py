"""Noise levels sigma for sampling and training under sgm's names: x = x_0 + sigma noise (arXiv 2206.00364)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.modules.diffusionmodules.util import make_beta_schedule


class Discretization:
    """Called with a number n of levels, returns n sigmas, descending, and then 0 unless `do_append_zero` is false.
    With `flip` the order is reversed."""

    def get_sigmas(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """n sigmas [n], descending."""
        raise NotImplementedError

    def __call__(
        self, n: int, do_append_zero: bool = True, device: torch.device | str = "cpu", flip: bool = False
    ) -> Tensor:
        sigmas = self.get_sigmas(n, device=device)
        if do_append_zero:
            sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        return sigmas.flip(0) if flip else sigmas


class EDMDiscretization(Discretization):
    """Karras et al. (arXiv 2206.00364), eq. 5."""

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def get_sigmas(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        ramp = torch.linspace(0, 1, n, device=device)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (high + ramp * (low - high)) ** self.rho


class LegacyDDPMDiscretization(Discretization):
    """The levels sqrt((1 - alpha_bar) / alpha_bar) of n time steps of DDPM, spread evenly from the last one.

    Time step 0 is included only for n = num_timesteps. Raises `InputError` for n outside 1 .. num_timesteps.
    """

    def __init__(self, linear_start: float = 0.00085, linear_end: float = 0.0120, num_timesteps: int = 1000) -> None:
        self.num_timesteps = num_timesteps
        betas = make_beta_schedule("linear", num_timesteps, linear_start=linear_start, linear_end=linear_end)
        self.betas, self.alphas_cumprod = betas, np.cumprod(1 - betas)

    def get_sigmas(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        if not 1 <= n <= self.num_timesteps:
            raise InputError(f"cannot sample in {n} steps: expected 1 to {self.num_timesteps}")
        alphas_cumprod = self.alphas_cumprod[evenly_spaced(n, self.num_timesteps)]
        # As published, the ratio is rounded to float32 before the square root.
        return torch.tensor((1 - alphas_cumprod) / alphas_cumprod, dtype=torch.float32, device=device) ** 0.5


def evenly_spaced(n: int, total: int) -> np.ndarray:
    """n of `total` time steps, descending from the last one; 0 is included only for n = total."""
    return np.arange(total)[::-1] if n == total else np.linspace(total - 1, 0, n, endpoint=False).astype(int)
