"""The diffusion process: its constants as buffers, the forward process, and its posterior (arXiv 2006.11239)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ldm.models.diffusion.prediction import PREDICTIONS, Prediction
from ldm.models.diffusion.schedule import ddpm_buffers, zero_terminal
from ldm.modules.diffusionmodules.util import extract_into_tensor, make_beta_schedule


class DiffusionProcess(nn.Module):
    """Section 2 of the paper as methods. All tensors are [b, c, h, w], steps t are [b].

    Subclasses set `v_posterior` and `prediction` before they call `register_schedule`.
    """

    v_posterior = 0.0
    zero_terminal_snr = False
    saves_schedule = True  # whether the constants are in the state dict
    prediction: Prediction = PREDICTIONS["eps"]

    def register_schedule(
        self,
        given_betas: Any = None,
        beta_schedule: str = "linear",
        timesteps: int = 1000,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
    ) -> None:
        """Register the constants of the diffusion process as buffers."""
        if given_betas is None:
            given_betas = make_beta_schedule(beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        if self.zero_terminal_snr:
            given_betas = zero_terminal(given_betas)
        buffers = ddpm_buffers(given_betas, self.v_posterior, self.prediction)
        self.num_timesteps = len(buffers["betas"])
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=self.saves_schedule and name != "lvlb_weights")

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        return extract_into_tensor(getattr(self, name), t, like.shape)

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), eq. 4."""
        mean = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = 1.0 - self._at("alphas_cumprod", t, x_start)
        return mean, variance, self._at("log_one_minus_alphas_cumprod", t, x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise, eq. 4."""
        noise = torch.randn_like(x_start) if noise is None else noise
        signal = self._at("sqrt_alphas_cumprod", t, x_start) * x_start
        return signal + self._at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 from x_t and its noise, eq. 4 solved for x_0."""
        return (
            self._at("sqrt_recip_alphas_cumprod", t, x_t) * x_t
            - self._at("sqrt_recipm1_alphas_cumprod", t, x_t) * noise
        )

    def predict_start_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 from x_t and its velocity."""
        return PREDICTIONS["v"].to_x0(v, x_t, *self.level(t, x_t))

    def predict_eps_from_z_and_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """The noise from x_t and its velocity."""
        return PREDICTIONS["v"].to_epsilon(v, x_t, *self.level(t, x_t))

    def get_v(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The velocity of clean x under noise at steps t."""
        return PREDICTIONS["v"].target(x, noise, *self.level(t, x))

    def level(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) of x_t = a x_0 + s noise at steps t [b], shaped to multiply `like`.

        Between the steps of training, which DPM-Solver visits, log(a) is interpolated linearly (arXiv 2206.00927,
        App. D.4).
        """
        if not t.is_floating_point():
            return self._at("sqrt_alphas_cumprod", t, like), self._at("sqrt_one_minus_alphas_cumprod", t, like)
        below = t.floor().long().clamp(0, self.num_timesteps - 1)
        above = (below + 1).clamp(max=self.num_timesteps - 1)
        precise = torch.float32 if t.device.type == "mps" else torch.float64  # MPS has no float64
        log_a = self.sqrt_alphas_cumprod.to(precise).log()
        log_a = torch.lerp(log_a[below], log_a[above], (t - below).to(log_a))
        shape = (len(t), *(1,) * (like.dim() - 1))
        return log_a.exp().to(like).view(shape), (-torch.expm1(2 * log_a)).sqrt().to(like).view(shape)

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), eqs. 6 and 7."""
        mean = self._at("posterior_mean_coef1", t, x_t) * x_start + self._at("posterior_mean_coef2", t, x_t) * x_t
        variance = self._at("posterior_variance", t, x_t)
        return mean, variance, self._at("posterior_log_variance_clipped", t, x_t)
