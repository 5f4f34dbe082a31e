"""PLMS, the pseudo linear multi-step sampler of PNDM (arXiv 2202.09778): one function, and LDM's class over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.guidance import Denoise
from ldm.models.diffusion.sampling import Blend, Draw, LatentSampler, Progress, Step, unchanged


def plms(
    denoise: Denoise,
    x: Tensor,
    steps: Sequence[Step],
    draw_noise: Draw,
    *,
    blend: Blend = unchanged,
    fix_x0: Callable[[Tensor], Tensor] = unchanged,
    on_step: Callable[[int, int, Tensor, Tensor], Any] = unchanged,
    progress: Progress = iter,
) -> Tensor:
    """From x [b, c, h, w] at the noise level of the first step to a sample. `steps` descend; sigma is not used.

    As published, one noise is drawn (and not used) in every update: seeds then mean the same as in DDIM.
    """

    def transfer(x: Tensor, step: Step, eps: Tensor) -> tuple[Tensor, Tensor]:
        # Eq. 11 in the form of DDIM (arXiv 2010.02502) Eq. 12 with sigma = 0
        draw_noise()
        pred_x0 = fix_x0((x - (1 - step.alpha) ** 0.5 * eps) / step.alpha**0.5)
        return step.alpha_prev**0.5 * pred_x0 + (1 - step.alpha_prev) ** 0.5 * eps, pred_x0

    def at(t: int) -> Tensor:
        return torch.full((len(x),), t, device=x.device)

    before: list[Tensor] = []  # the model's last three predictions, newest first
    for i, step in enumerate(progress(steps)):
        x = blend(x, step.alpha)
        eps = denoise(x, at(step.t))
        if len(before) == 0:
            # In place of the paper's Runge-Kutta start (Eq. 13), as published: pseudo improved Euler, two calls
            x_ahead, _ = transfer(x, step, eps)
            best = (eps + denoise(x_ahead, at(steps[min(i + 1, len(steps) - 1)].t))) / 2
        elif len(before) == 1:
            best = (3 * eps - before[0]) / 2  # Adams-Bashforth of order 2
        elif len(before) == 2:
            best = (23 * eps - 16 * before[0] + 5 * before[1]) / 12  # of order 3
        else:
            best = (55 * eps - 59 * before[0] + 37 * before[1] - 9 * before[2]) / 24  # of order 4: Eq. 12
        x, pred_x0 = transfer(x, step, best)
        before = [eps, *before[:2]]
        on_step(i, len(steps), x, pred_x0)
    return x


class PLMSSampler(LatentSampler):
    """LDM's PLMS sampler: deterministic, S + 1 calls of the model."""

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """As for DDIM. Raises `InputError` if eta is not 0."""
        if ddim_eta != 0:
            raise InputError(f"PLMS is deterministic, but eta is {ddim_eta}: use eta 0 or the DDIM sampler")
        super().make_schedule(ddim_num_steps, ddim_discretize, ddim_eta, verbose)

    def run(self, denoise: Denoise, x: Tensor, draw_noise: Draw, *, temperature, noise_dropout, **parts: Any) -> Tensor:
        # Both scale the noise of an update, and PLMS adds none.
        return plms(denoise, x, self.steps()[::-1], draw_noise, **parts)
