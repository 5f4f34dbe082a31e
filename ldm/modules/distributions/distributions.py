"""The diagonal Gaussian in which the first stage encodes a picture."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class DiagonalGaussianDistribution:
    """N(mean, exp(logvar)) from `parameters` [b, 2c, h, w]: means first, then log-variances, clamped to -30 .. 20.

    `deterministic` takes the variance as 0.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False):
        self.parameters, self.deterministic = parameters, deterministic
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + std * noise; the noise is drawn on the CPU, so that a seed means the same on every device."""
        # Auto-Encoding Variational Bayes (arXiv 1312.6114) Sec. 3
        noise = torch.randn(self.mean.shape, generator=generator) if noise is None else noise
        return self.mean + self.std * noise.to(self.mean, non_blocking=True)

    def mode(self) -> Tensor:
        """The mean."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """The divergence to `other`, N(0, 1) by default, summed over c, h, w: [b]. Zero if deterministic: [1]."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        zero = torch.zeros_like(self.mean)
        mean, logvar = (zero, zero) if other is None else (other.mean, other.logvar)
        return normal_kl(self.mean, self.logvar, mean, logvar).sum(dim=[1, 2, 3])

    def nll(self, sample: Tensor, dims: tuple[int, ...] | list[int] = (1, 2, 3)) -> Tensor:
        """-log p(sample), summed over `dims`: [b]. Zero if deterministic: [1]."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var
        return 0.5 * terms.sum(dim=list(dims))


def normal_kl(mean1: Tensor, logvar1: Tensor | float, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), element by element; floats and tensors broadcast.

    arXiv 1312.6114 App. B for a general second Gaussian.
    """
    like = next(x for x in (mean1, logvar1, mean2, logvar2) if isinstance(x, Tensor))
    logvar1, logvar2 = (torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in (logvar1, logvar2))
    return 0.5 * (logvar2 - logvar1 - 1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))
