"""Small parts of the UNet, and noise schedules as plain numbers, under LDM's import path."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.modules.parts import checkpoint, zero_module  # noqa: F401 (LDM has them here)


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
    """`values[t]` as [b, 1, 1, ...], which broadcasts against a tensor of the given shape."""
    return values.gather(-1, t).reshape(len(t), *(1,) * (len(shape) - 1))


def noise_like(shape: tuple[int, ...], device: torch.device | str, repeat: bool = False) -> Tensor:
    """Standard normal noise; with `repeat` the same for the whole batch."""
    if repeat:
        return torch.randn((1, *shape[1:]), device=device).expand(shape).clone()
    return torch.randn(shape, device=device)


class GroupNorm32(nn.GroupNorm):
    """Group norm computed in fp32 for any input dtype, e.g. a half-precision base."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def normalization(channels: int, groups: int = 32) -> nn.Module:
    """The group norm of residual blocks, eps 1e-5."""
    return GroupNorm32(groups, channels)


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """A convolution over 1, 2 or 3 dimensions."""
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Average pooling over 1, 2 or 3 dimensions."""
    return {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](*args, **kwargs)


# --- noise schedules: the betas of training, the time steps and noise levels of DDIM sampling


def make_beta_schedule(
    schedule: str,
    n_timestep: int,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """The variances beta_t of the forward process, DDPM (arXiv 2006.11239) Eq. 2: float64, [n_timestep].

    LDM's names are kept: `linear` is linear in sqrt(beta), `sqrt_linear` is linear in beta, `sqrt` is its square root.
    Raises `InputError` for an unknown schedule and for fewer than one step.
    """
    if n_timestep < 1:
        raise InputError(f"a noise schedule needs at least 1 step, got timesteps={n_timestep}")
    if n_timestep > 10**6:
        raise InputError(f"a noise schedule of {n_timestep} steps is too long: timesteps must be at most 1000000")
    if schedule == "linear":
        return np.linspace(linear_start**0.5, linear_end**0.5, n_timestep) ** 2
    if schedule == "cosine":
        # Improved DDPM (arXiv 2102.09672) Eq. 17: alpha_bar = f(t) / f(0), f(t) = cos^2(((t/T + s) / (1 + s)) pi/2)
        times = np.arange(n_timestep + 1) / n_timestep
        alpha_bar = np.cos((times + cosine_s) / (1 + cosine_s) * np.pi / 2) ** 2
        return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)
    if schedule == "sqrt_linear":
        return np.linspace(linear_start, linear_end, n_timestep)
    if schedule == "sqrt":
        return np.linspace(linear_start, linear_end, n_timestep) ** 0.5
    raise InputError(f"unknown beta_schedule {schedule!r}: expected linear, cosine, sqrt_linear or sqrt")


def make_ddim_timesteps(
    ddim_discr_method: str, num_ddim_timesteps: int, num_ddpm_timesteps: int, verbose: bool = False
) -> np.ndarray:
    """The sub-sequence tau of the training steps which a sampler visits, DDIM (arXiv 2010.02502) Sec. 4.2 and App. D.2.

    Ascending integers in 0 .. num_ddpm_timesteps - 1. `uniform` has distinct steps, and more than `num_ddim_timesteps`
    of them where the division leaves a rest (31 for S=30); `quad` may repeat a step; `trailing` ends at the last one.

    The published formulas are kept as far as they stay inside the schedule. `range(0, T, T // S) + 1` reaches T itself
    if T // S divides T - 1 (T=1000: S = 3, 9, 27, 36, 37, 101-111, 251-333); that step is left out. Above S = T / 2 the
    published stride is 1; here S steps are spread evenly and end at T - 1. As published, S = 1 is step 1 alone, which
    removes hardly any noise; use DPM-Solver for very few steps.

    Raises `InputError` for an unknown method and for S outside 1 .. T.
    """
    count, total = num_ddim_timesteps, num_ddpm_timesteps
    if not 1 <= count <= total:
        raise InputError(f"cannot sample in {count} steps: expected 1 to {total}, the steps the model was trained with")
    if ddim_discr_method == "uniform":
        stride = total // count
        if stride == 1:
            return total - 1 - np.arange(count)[::-1] * total // count
        steps = np.arange(0, total, stride) + 1
        return steps[steps < total]
    if ddim_discr_method == "quad":
        steps = (np.linspace(0, np.sqrt(total * 0.8), count) ** 2).astype(int) + 1
        return np.minimum(steps, total - 1)
    if ddim_discr_method == "trailing":  # the last one of each of S equal parts (arXiv 2305.08891, section 3.3)
        return np.round(total - np.arange(count) * total / count).astype(int)[::-1] - 1
    raise InputError(f"unknown ddim_discretize {ddim_discr_method!r}: expected uniform, quad or trailing")


def make_ddim_sampling_parameters(
    alphacums: Tensor | np.ndarray, ddim_timesteps: np.ndarray, eta: float, verbose: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(sigmas, alphas, alphas_prev) of every visited step, [S] each, on the CPU; alphas in the type of `alphacums`.

    The paper's alpha is DDPM's alpha_bar. As published, the last update ends at alphacums[0], not at 1.
    Raises `InputError` unless 0 <= eta <= 1.
    """
    if not 0 <= eta <= 1:
        raise InputError(f"ddim eta is {eta}: expected 0 (deterministic) to 1 (the noise of DDPM)")
    alphacums = torch.as_tensor(alphacums).detach().cpu()
    alphas = alphacums[torch.as_tensor(np.ascontiguousarray(ddim_timesteps))]
    alphas_prev = torch.cat([alphacums[:1], alphas[:-1]]).double()
    # DDIM (arXiv 2010.02502) Eq. 16
    a = alphas.double()
    sigmas = eta * ((1 - alphas_prev) / (1 - a) * (1 - a / alphas_prev)).sqrt()
    return sigmas, alphas, alphas_prev
