"""sgm's training loss: distributions of sigma, and weights of the errors of D(x, sigma) (arXiv 2206.00364)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.config import instantiate_from_config
from ldm.errors import InputError

ERRORS = {"l2": lambda error: error**2, "l1": torch.abs}


class UnitWeighting:
    """Equal weights of all levels."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class EDMWeighting:
    """lambda(sigma) of table 1 in the paper."""

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = sigma_data

    def __call__(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


class VWeighting(EDMWeighting):
    """The error of a predicted velocity: that of x_0 times (sigma^2 + 1) / sigma^2."""

    def __init__(self) -> None:
        super().__init__(sigma_data=1.0)


class EpsWeighting:
    """The error of a predicted noise: that of x_0 divided by sigma^2."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma**-2.0


class DiscreteSampling:
    """Levels drawn uniformly from `num_idx` levels of a discretization."""

    def __init__(
        self,
        discretization_config: Mapping,
        num_idx: int,
        do_append_zero: bool = False,
        flip: bool = True,
        idx_range: Sequence[int] | None = None,
    ) -> None:
        self.num_idx, self.idx_range = num_idx, tuple(idx_range or (0, num_idx))
        if not 0 <= self.idx_range[0] < self.idx_range[-1] <= num_idx or len(self.idx_range) != 2:
            raise InputError(f"DiscreteSampling: idx_range must lie within 0 to {num_idx}, got {list(self.idx_range)}")
        discretization = instantiate_from_config(discretization_config)
        self.sigmas = discretization(num_idx, do_append_zero=do_append_zero, flip=flip)

    def idx_to_sigma(self, idx: Tensor) -> Tensor:
        """The sigmas of levels by their numbers."""
        return self.sigmas.to(idx.device)[idx]

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """Sigmas [n_samples]; `rand` are their numbers if they are drawn already."""
        idx = torch.randint(*self.idx_range, (n_samples,)) if rand is None else rand
        return self.idx_to_sigma(idx)


class EDMSampling:
    """log(sigma) ~ N(p_mean, p_std^2), section 5 of the paper."""

    def __init__(self, p_mean: float = -1.2, p_std: float = 1.2) -> None:
        self.p_mean, self.p_std = p_mean, p_std

    def __call__(self, n_samples: int, rand: Tensor | None = None) -> Tensor:
        """Sigmas [n_samples]; `rand` are N(0, 1) numbers if they are drawn already."""
        rand = torch.randn((n_samples,)) if rand is None else rand
        return (self.p_mean + self.p_std * rand).exp()


class StandardDiffusionLoss:
    """The weighted error of D(x_0 + sigma noise, sigma) for each sample, [b]: l2, or l1.

    `offset_noise_level`: the factor of additional noise with one number per picture and channel.
    `batch2model_keys`: entries of the batch that the network gets as additional arguments.
    Raises `InputError` for another kind.
    """

    def __init__(
        self,
        sigma_sampler_config: Mapping,
        loss_weighting_config: Mapping,
        loss_type: str = "l2",
        offset_noise_level: float = 0.0,
        batch2model_keys: str | Sequence[str] | None = None,
    ) -> None:
        if loss_type not in ERRORS:
            raise InputError(f"StandardDiffusionLoss: loss_type must be l2 or l1, got {loss_type!r}")
        self.loss_type, self.offset_noise_level = loss_type, offset_noise_level
        self.sigma_sampler = instantiate_from_config(sigma_sampler_config)
        self.loss_weighting = instantiate_from_config(loss_weighting_config)
        keys = [batch2model_keys] if isinstance(batch2model_keys, str) else batch2model_keys or ()
        self.batch2model_keys = set(keys)

    def __call__(
        self,
        network: Callable[..., Tensor],
        denoiser: Callable[..., Tensor],
        conditioner: Callable[[Mapping], Any],
        input: Tensor,
        batch: Mapping[str, Any],
    ) -> Tensor:
        """Errors [b] of x_0 `input` [b, c, h, w]. Levels are drawn first, then the noise."""
        cond = conditioner(batch)
        further = {key: batch[key] for key in self.batch2model_keys.intersection(batch)}
        return self._forward(network, denoiser, cond, input, further)

    def _forward(
        self,
        network: Callable[..., Tensor],
        denoiser: Callable[..., Tensor],
        cond: Any,
        input: Tensor,
        further: Mapping,
    ) -> Tensor:
        sigmas = self.sigma_sampler(len(input)).to(input)
        noise = torch.randn_like(input)
        shape = (len(input), *(1,) * (input.dim() - 1))
        if self.offset_noise_level > 0:
            offset = torch.randn(input.shape[:2], device=input.device)
            noise = noise + self.offset_noise_level * offset.view(*input.shape[:2], *(1,) * (input.dim() - 2))
        predicted = denoiser(network, input + noise * sigmas.view(shape), sigmas, cond, **further)
        return self.get_loss(predicted, input, self.loss_weighting(sigmas).view(shape))

    def get_loss(self, model_output: Tensor, target: Tensor, w: Tensor) -> Tensor:
        """Weighted errors [b], the mean over c, h, w."""
        return (w * ERRORS[self.loss_type](model_output - target)).flatten(1).mean(1)
