"""LDM's DDIM sampler class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.models.diffusion.latent_sampler import DDIMSchedule
from ldm.models.diffusion.sampler_parts import Parts
from ldm.models.diffusion.samplers import Generators, Step, ddim, draw


class DDIMSampler(DDIMSchedule):
    """LDM's DDIM sampler: `sample`, and `stochastic_encode` and `decode` to start from a picture."""

    name = "ddim"

    @torch.no_grad()
    def stochastic_encode(
        self,
        x0: Tensor,
        t: Tensor | int,
        use_original_steps: bool = False,
        noise: Tensor | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """x0 [b, c, h, w] with the noise of step number t [b] of `make_schedule`, or of training.

        `decode` then starts at t_start = t. As in LDM, the noise is that of the step after the start of decoding; if t
        equals the number of steps, it is that of the last step. Raises `InputError` for other t outside 0 .. number of
        steps.
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
        steps = self._training_steps() if use_original_steps else self.steps
        if not 1 <= t_start <= len(steps):
            raise InputError(f"cannot decode from step {t_start}: expected 1 to {len(steps)}, the number of steps")
        return ddim(
            self.guided(cond, unconditional_conditioning, unconditional_guidance_scale),
            x_latent,
            steps[-t_start:],
            lambda: draw(x_latent.shape, x_latent.device, generator),
            Parts(progress=self.progress(verbose)),
        )

    def _training_steps(self) -> list[Step]:
        """Every step of training, descending; the last one ends at 1. The eta is that of `make_schedule`."""
        a = self.model.alphas_cumprod.detach().cpu().double()
        a_prev = torch.cat([torch.ones(1, dtype=a.dtype), a[:-1]])
        # Eq. 16
        stds = self.ddim_eta * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        return [Step(*row) for row in zip(range(len(a)), a.tolist(), a_prev.tolist(), stds.tolist(), strict=True)][::-1]
