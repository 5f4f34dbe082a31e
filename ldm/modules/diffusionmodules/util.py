"""Small parts of the UNet, and the schedule functions under the names that users' scripts import from here."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from ldm.errors import InputError
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


def normalization(channels: int, groups: int = 32) -> nn.Module:
    """The group norm of residual blocks, eps 1e-5."""
    return GroupNorm32(groups, channels)


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


# What selective checkpointing keeps: results that take long to compute again. Norms and activation functions do not.
ATTENTIONS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
COSTLY = [torch.ops.aten.convolution.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default] + [
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ATTENTIONS
    if hasattr(torch.ops.aten, f"_scaled_dot_product_{kind}")
]
CHECKPOINTS = {
    True: {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, COSTLY)},
}


def checkpoint(function: Callable, inputs: tuple, kind: bool | str):
    """`function(*inputs)`; with `kind` True its activations are computed again in the backward pass instead of kept.

    "selective" keeps the results of matrix products, convolutions and attention, and computes the rest again.
    The non-reentrant kind: parameters need not be listed, frozen ones get no gradient, `torch.compile` takes it.
    Raises `InputError` for another kind.
    """
    if kind not in (False, *CHECKPOINTS):
        raise InputError(f"use_checkpoint must be true, false or selective, got {kind!r}")
    if kind and torch.is_grad_enabled():
        return torch_checkpoint(function, *inputs, use_reentrant=False, **CHECKPOINTS[kind])
    return function(*inputs)
