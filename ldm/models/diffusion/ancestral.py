"""Ancestral sampling through all steps, and diagnostic pictures: LDM's methods of models.

This is Algorithm 2 of DDPM (arXiv 2006.11239) as methods of LDM's model classes. Programs use `samplers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ldm.errors import InputError
from ldm.models.diffusion.samplers import Generators, draw, keep_known

Intermediates = list[Tensor]


class AncestralSampling:
    """A mixin for a `DiffusionProcess` with `apply_model`, `prediction`, `channels` and `image_size`."""

    clips_x0 = True  # to -1 .. 1; False for latents, which have no bounds

    def p_mean_variance(
        self, x: Tensor, t: Tensor, cond: Any = None, clip_denoised: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of p(x_{t-1} | x_t) for x_t [b, c, h, w] at steps t [b]: eqs. 7 and 11."""
        predicted = self.apply_model(x, t, cond)
        x0 = self.prediction.to_x0(predicted, x, *self.level(t, x))
        clips = self.clips_x0 if clip_denoised is None else clip_denoised
        return self.q_posterior(x0.clamp(-1, 1) if clips else x0, x, t)

    @torch.no_grad()
    def p_sample(
        self, x: Tensor, t: Tensor, cond: Any = None, clip_denoised: bool | None = None, generator: Generators = None
    ) -> Tensor:
        """x_{t-1} [b, c, h, w] from x_t; at t = 0 without noise (Algorithm 2)."""
        mean, _, log_variance = self.p_mean_variance(x, t, cond, clip_denoised)
        noise = draw(x.shape, x.device, generator)
        return mean + (t > 0).view(-1, 1, 1, 1) * (0.5 * log_variance).exp() * noise

    @torch.no_grad()
    def p_sample_loop(
        self,
        cond: Any,
        shape: Sequence[int],
        return_intermediates: bool = False,
        x_T: Tensor | None = None,
        verbose: bool = True,
        callback: Callable[[int], None] | None = None,
        timesteps: int | None = None,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        start_T: int | None = None,
        log_every_t: int | None = None,
        generator: Generators = None,
    ) -> Any:
        """A sample of this shape, [b, c, h, w], from noise through every step; optionally with intermediate results.

        timesteps, start_T: begin at this step instead of the last one; mask, x0: see `keep_known`; callback(t) and
        img_callback(x, t) after every step. Raises `InputError` for a mask without x0.
        """
        if mask is not None and x0 is None:
            raise InputError("sampling with a mask needs x0, the picture to keep where the mask is 1")
        device = self.betas.device
        x = draw(shape, device, generator) if x_T is None else x_T.to(device)
        count = min(one for one in (timesteps, start_T, self.num_timesteps) if one is not None)
        blend = None if mask is None else keep_known(x0, mask, lambda: draw(shape, device, generator))
        every, kept = log_every_t or self.log_every_t, [x]
        for step in tqdm(reversed(range(count)), total=count, desc="DDPM", disable=not verbose):
            t = torch.full((len(x),), step, device=device, dtype=torch.long)
            x = self.p_sample(x, t, cond, generator=generator)
            if blend is not None:
                x = blend(x, float(self.alphas_cumprod[step]))
            if step % every == 0 or step == count - 1:
                kept.append(x)
            if callback:
                callback(step)
            if img_callback:
                img_callback(x, step)
        return (x, kept) if return_intermediates else x

    @torch.no_grad()
    def progressive_denoising(
        self, cond: Any, shape: Sequence[int], verbose: bool = True, log_every_t: int | None = None, **more: Any
    ) -> tuple[Tensor, Intermediates]:
        """A sample and the intermediate estimates of x_0 (DDPM, section 4.3). `more`: arguments of `p_sample_loop`."""
        estimates: Intermediates = []
        every = log_every_t or self.log_every_t

        def look(x: Tensor, step: int) -> None:
            if step % every == 0 and step:
                t = torch.full((len(x),), step - 1, device=x.device, dtype=torch.long)
                estimates.append(self.prediction.to_x0(self.apply_model(x, t, cond), x, *self.level(t, x)))

        sample = self.p_sample_loop(cond, shape, verbose=verbose, img_callback=look, **more)
        return sample, [*estimates, sample]

    @torch.no_grad()
    def sample(
        self,
        cond: Any = None,
        batch_size: int = 16,
        return_intermediates: bool = False,
        shape: Sequence[int] | None = None,
        **more: Any,
    ) -> Any:
        """`p_sample_loop` for a batch of the model's own size; a longer condition is cut to the batch."""
        shape = shape or (batch_size, self.channels, self.image_size, self.image_size)
        return self.p_sample_loop(_first(cond, batch_size), shape, return_intermediates, **more)

    @torch.no_grad()
    def sample_log(self, cond: Any, batch_size: int, ddim: bool, ddim_steps: int, **more: Any) -> tuple[Tensor, Any]:
        """A batch by DDIM or, without `ddim`, through every step; and the intermediate results."""
        if not ddim:
            return self.sample(cond, batch_size, return_intermediates=True, **more)
        from ldm.models.diffusion.ddim import DDIMSampler

        shape = (self.channels, self.image_size, self.image_size)
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, _first(cond, batch_size), verbose=False, **more)

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int | None = 200,
        ddim_eta: float = 1.0,
        return_keys: Iterable[str] | None = None,
        inpaint: bool = True,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True,
    ) -> dict[str, Tensor]:
        """Diagnostic pictures [n, 3, H, W] in [-1, 1] for a batch, under LDM's names.

        `inputs`, `reconstruction` (through the first stage), `diffusion_row` (noised), `samples`, `denoise_row`
        (intermediate), `samples_inpainting` and `samples_outpainting` (the centre square is painted, or kept),
        `progressive_row` (estimates of x_0). ddim_steps None: through every step. `return_keys`: only these.
        """
        batch = {key: value[:N] for key, value in batch.items()}
        latents, cond = self.clean(batch)
        count, shape = len(latents), tuple(latents.shape)
        shown = {"inputs": self.get_input(batch, self.first_stage_key), "reconstruction": self._shown(latents)}
        ddim = ddim_steps is not None
        options = {"eta": ddim_eta} if ddim else {"verbose": False}
        drawn = partial(self.sample_log, cond, count, ddim, ddim_steps, **options)
        if plot_diffusion_rows:
            shown["diffusion_row"] = self._shown(self._noised(latents[:n_row]))
        if sample:
            samples, way = drawn()
            shown["samples"] = self._shown(samples)
            if plot_denoise_rows:
                shown["denoise_row"] = self._shown(torch.cat(way["x_inter"] if ddim else way))
        if sample and inpaint:
            hole = _around_the_centre(latents)
            for name, mask in (("samples_inpainting", hole), ("samples_outpainting", 1 - hole)):
                samples, _ = drawn(x0=latents, mask=mask)
                shown[name] = self._shown(samples)
        if plot_progressive_rows:
            _, estimates = self.progressive_denoising(cond, shape, verbose=False)
            shown["progressive_row"] = self._shown(torch.cat(estimates))
        wanted = set(return_keys or shown)
        return {name: value for name, value in shown.items() if name in wanted} or shown

    def _noised(self, latents: Tensor) -> Tensor:
        """Noised latents at every `log_every_t`-th step and at the last one, concatenated step by step."""
        last = self.num_timesteps - 1
        steps = [t for t in range(self.num_timesteps) if t % self.log_every_t == 0 or t == last]
        return torch.cat([
            self.q_sample(latents, torch.full((len(latents),), t, device=latents.device)) for t in steps
        ])  # fmt: skip

    def _shown(self, x: Tensor) -> Tensor:
        """Latents, or whatever the diffusion works on, as pictures."""
        decode = getattr(self, "decode_first_stage", None)
        return x if decode is None else decode(x)


def _around_the_centre(latents: Tensor) -> Tensor:
    """A mask [b, 1, h, w] for latents [b, c, h, w]: 0 in the square in the middle, half as high and wide, else 1."""
    mask = torch.ones_like(latents[:, :1])
    top, left = (side // 4 for side in latents.shape[2:])
    mask[:, :, top : 3 * top, left : 3 * left] = 0
    return mask


def _first(cond: Any, count: int) -> Any:
    """The first rows of a condition of any form."""
    if isinstance(cond, Tensor):
        return cond[:count]
    if isinstance(cond, Mapping):
        return {key: _first(value, count) for key, value in cond.items()}
    return [_first(one, count) for one in cond] if isinstance(cond, (list, tuple)) else cond
