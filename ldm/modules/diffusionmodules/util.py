"""Small parts of the UNet, and the schedule functions under the names that users' scripts import from here."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from ldm.modules.diffusionmodules.schedules import (  # noqa: F401
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000, repeat_only: bool = False) -> Tensor:
    """Sinusoidal embedding [b, dim] of time steps [b] (whole or not): cosines first (arXiv 1706.03762, section 3.5).

    With `repeat_only` the steps themselves, repeated.
    """
    if repeat_only:
        return timesteps[:, None].repeat(1, dim)
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    )
    angles = timesteps[:, None].float() * frequencies
    return nn.functional.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, dim % 2))


def extract_into_tensor(values: Tensor, t: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """`values[t]` as [b, 1, 1, ...], ready to be multiplied with a tensor of the given shape."""
    return values.gather(-1, t).reshape(len(t), *(1,) * (len(shape) - 1))


def noise_like(shape: tuple[int, ...], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Standard normal noise; with `repeat` the same for the whole batch."""
    if repeat:
        return torch.randn((1, *shape[1:]), device=device).expand(shape).clone()
    return torch.randn(shape, device=device)


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in fp32, whatever the dtype of the input (a half precision base with fp32 statistics)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def normalization(channels: int) -> nn.Module:
    """The 32-group norm of residual blocks, eps 1e-5."""
    return GroupNorm32(32, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a new branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A convolution over 1, 2 or 3 dimensions."""
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Average pooling over 1, 2 or 3 dimensions."""
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)


def checkpoint(function, inputs: tuple, enabled: bool):
    """`function(*inputs)`, its activations recomputed in the backward pass instead of kept if `enabled`.

    The non-reentrant kind: parameters need not be listed, frozen ones get no gradient, `torch.compile` takes it.
    """
    if enabled and torch.is_grad_enabled():
        return torch_checkpoint(function, *inputs, use_reentrant=False)
    return function(*inputs)
