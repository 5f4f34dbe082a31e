"""Denoisers D(x, sigma), which estimate x_0 in x = x_0 + sigma noise with a network (Karras et al., 2206.00364).

D = c_skip x + c_out F(c_in x, c_noise), eq. 7. The four factors define what the network F predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import instantiate_from_config

Factors = tuple[Tensor, Tensor, Tensor, Tensor]  # c_skip, c_out, c_in, c_noise


class EDMScaling:
    """Table 1 of the paper, "ours"."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Factors:
        total = sigma**2 + self.sigma_data**2
        c_out = sigma * self.sigma_data / total**0.5
        return self.sigma_data**2 / total, c_out, 1 / total**0.5, 0.25 * sigma.log()


class EpsScaling:
    """The network predicts the noise, as in Stable Diffusion and SDXL."""

    prediction = "eps"

    def __call__(self, sigma: Tensor) -> Factors:
        return torch.ones_like(sigma), -sigma, 1 / (sigma**2 + 1.0) ** 0.5, sigma.clone()


class VScaling:
    """The network predicts the velocity, as in Stable Diffusion 2.x (arXiv 2202.00512)."""

    prediction = "v"

    def __call__(self, sigma: Tensor) -> Factors:
        total = sigma**2 + 1.0
        return 1.0 / total, -sigma / total**0.5, 1.0 / total**0.5, sigma.clone()


class VScalingWithEDMcNoise(VScaling):
    """The same, but the network gets log(sigma) / 4 instead of a time step."""

    def __call__(self, sigma: Tensor) -> Factors:
        return (*super().__call__(sigma)[:3], 0.25 * sigma.log())


class Denoiser(nn.Module):
    """D for a `scaling_config`; see the module's docstring."""

    def __init__(self, scaling_config: Mapping) -> None:
        super().__init__()
        self.scaling = instantiate_from_config(scaling_config)

    def possibly_quantize_sigma(self, sigma: Tensor) -> Tensor:
        """The sigma [b] that replaces the given one."""
        return sigma

    def possibly_quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        """The network's input for this c_noise [b]."""
        return c_noise

    def forward(
        self, network: Callable[..., Tensor], input: Tensor, sigma: Tensor, cond: Any, **additional_model_inputs: Any
    ) -> Tensor:
        """The estimate of x_0 [b, c, h, w] for x [b, c, h, w] at sigma [b] with a condition."""
        sigma = self.possibly_quantize_sigma(sigma)
        shape = (len(sigma), *(1,) * (input.dim() - 1))
        c_skip, c_out, c_in, c_noise = self.scaling(sigma.view(shape))
        told = self.possibly_quantize_c_noise(c_noise.reshape(sigma.shape))
        return network(input * c_in, told, cond, **additional_model_inputs) * c_out + input * c_skip


class DiscreteDenoiser(Denoiser):
    """D for `num_idx` levels: sigma is replaced by the nearest level, and the network gets the level's number.

    The buffer `sigmas` [num_idx] is ascending, so the number is the time step of DDPM.
    """

    def __init__(
        self,
        scaling_config: Mapping,
        num_idx: int,
        discretization_config: Mapping,
        do_append_zero: bool = False,
        quantize_c_noise: bool = True,
        flip: bool = True,
    ) -> None:
        super().__init__(scaling_config)
        self.discretization = instantiate_from_config(discretization_config)
        self.num_idx, self.quantize_c_noise = num_idx, quantize_c_noise
        self.register_buffer("sigmas", self.discretization(num_idx, do_append_zero=do_append_zero, flip=flip))

    def sigma_to_idx(self, sigma: Tensor) -> Tensor:
        """The number of the nearest level for each sigma, of any shape."""
        distances = (sigma.flatten()[None] - self.sigmas[:, None]).abs()
        return distances.argmin(dim=0).view(sigma.shape)

    def idx_to_sigma(self, idx: Tensor | int) -> Tensor:
        """The sigmas of levels by their numbers."""
        return self.sigmas[idx]

    def possibly_quantize_sigma(self, sigma: Tensor) -> Tensor:
        return self.idx_to_sigma(self.sigma_to_idx(sigma))

    def possibly_quantize_c_noise(self, c_noise: Tensor) -> Tensor:
        return self.sigma_to_idx(c_noise) if self.quantize_c_noise else c_noise
