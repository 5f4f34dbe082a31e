"""DDIM (arXiv 2010.02502): the sampler as one function, and LDM's class over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.errors import InputError
from ldm.models.diffusion.guidance import Denoise
from ldm.models.diffusion.sampling import Blend, Draw, Generators, LatentSampler, Progress, Step, draw, unchanged


def ddim(
    denoise: Denoise,
    x: Tensor,
    steps: Sequence[Step],
    draw_noise: Draw,
    *,
    temperature: float = 1.0,
    noise_dropout: float = 0.0,
    blend: Blend = unchanged,
    fix_x0: Callable[[Tensor], Tensor] = unchanged,
    on_step: Callable[[int, int, Tensor, Tensor], Any] = unchanged,
    progress: Progress = iter,
) -> Tensor:
    """From x [b, c, h, w] at the noise level of the first step to a sample. `steps` descend.

    Noise is drawn in every step, with sigma 0 as well, so that a seed means the same for every eta.
    """
    for i, (t, alpha, alpha_prev, sigma) in enumerate(progress(steps)):
        x = blend(x, alpha)
        eps = denoise(x, torch.full((len(x),), t, device=x.device))
        # Eq. 12: the predicted x0, the direction pointing to x_t, random noise
        pred_x0 = fix_x0((x - (1 - alpha) ** 0.5 * eps) / alpha**0.5)
        direction = (1 - alpha_prev - sigma**2) ** 0.5 * eps
        noise = sigma * temperature * draw_noise()
        if noise_dropout > 0:
            noise = F.dropout(noise, p=noise_dropout)
        x = alpha_prev**0.5 * pred_x0 + direction + noise
        on_step(i, len(steps), x, pred_x0)
    return x


class DDIMSampler(LatentSampler):
    """LDM's DDIM sampler: `sample`, and for pictures as a start `stochastic_encode` and `decode`."""

    def run(self, denoise: Denoise, x: Tensor, draw_noise: Draw, **parts: Any) -> Tensor:
        return ddim(denoise, x, self.steps()[::-1], draw_noise, **parts)

    @torch.no_grad()
    def stochastic_encode(
        self,
        x0: Tensor,
        t: Tensor | int,
        use_original_steps: bool = False,
        noise: Tensor | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """x0 [b, c, h, w] with the noise of step number t [b]: of `make_schedule`, or of training if asked for.

        `decode` then starts at t_start = t. As in LDM the noise is that of the step after the one where decoding
        starts; t equal to the number of steps, for which there is none after, takes the last step.
        Raises `InputError` for other t outside 0 .. number of steps.
        """
        alphas = self.model.alphas_cumprod if use_original_steps else self.ddim_alphas
        t = torch.as_tensor(t).to(alphas.device)
        if not ((t >= 0) & (t <= len(alphas))).all():
            raise InputError(f"cannot encode to step {t.tolist()}: expected 0 to {len(alphas)}, the number of steps")
        alpha = alphas[t.clamp(max=len(alphas) - 1)].to(x0).view(-1, 1, 1, 1)  # b 1 1 1
        if noise is None:
            noise = draw(x0.shape, x0.device, generator)
        # DDPM (arXiv 2006.11239) Eq. 4
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise

    @torch.no_grad()
    def decode(
        self,
        x_latent: Tensor,
        cond: Any,
        t_start: int,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        use_original_steps: bool = False,
        generator: Generators = None,
        verbose: bool = True,
    ) -> Tensor:
        """The sample from x_latent [b, c, h, w] in the first `t_start` steps of the schedule, downwards.

        Raises `InputError` for a t_start outside 1 .. number of steps.
        """
        steps = self._training_steps() if use_original_steps else self.steps()
        if not 1 <= t_start <= len(steps):
            raise InputError(f"cannot decode from step {t_start}: expected 1 to {len(steps)}, the number of steps")
        return ddim(
            self.guided(cond, unconditional_conditioning, unconditional_guidance_scale),
            x_latent,
            steps[:t_start][::-1],
            lambda: draw(x_latent.shape, x_latent.device, generator),
            progress=self.progress(verbose),
        )

    def _training_steps(self) -> list[Step]:
        """Every step of training, with the last one ending at 1, and the eta of `make_schedule`."""
        a = self.model.alphas_cumprod.detach().cpu().double()
        a_prev = torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])
        # Eq. 16
        sigmas = self.ddim_eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        return [Step(*row) for row in zip(range(len(a)), a.tolist(), a_prev.tolist(), sigmas.tolist(), strict=True)]
