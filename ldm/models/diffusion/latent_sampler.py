"""The base of LDM's sampler classes: `.sample(...)` with LDM's arguments for a row of the table of samplers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm.errors import InputError
from ldm.models.diffusion.guidance import Denoise, guided
from ldm.models.diffusion.sampler_parts import Draw, Parts, Progress, unchanged
from ldm.models.diffusion.samplers import SAMPLERS, Generators, Sampler, draw, keep_known
from ldm.modules.diffusionmodules.util import make_ddim_sampling_parameters

log = logging.getLogger(__name__)


class LatentSampler:
    """LDM's interface of samplers: `.sample(...)` with LDM's arguments, which calls one function.

    `model` has apply_model(x, t, cond), betas and alphas_cumprod [T]. Samples are on the device of its betas.
    """

    name: str  # of the row in `SAMPLERS`

    def __init__(self, model: Any, schedule: str = "linear", **kwargs: Any):
        self.model = model

    @property
    def row(self) -> Sampler:
        return SAMPLERS[self.name]

    @property
    def device(self) -> torch.device:
        return self.model.betas.device

    def guided(self, cond: Any, uncond: Any, scale: float) -> Denoise:
        """denoise(x, t) -> noise. A model that may predict something other than noise has `predict_noise`."""
        return guided(getattr(self.model, "predict_noise", self.model.apply_model), cond, uncond, scale)

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the steps to visit; called by `sample`. Raises `InputError`, see `Sampler.steps`."""
        self.steps = self.row.steps(self.model.alphas_cumprod, ddim_num_steps, ddim_eta)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callable[[int], None] | None = None,
        normals_sequence: Any = None,
        img_callback: Callable[[Tensor, int], None] | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        generator: Generators = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Latents [batch_size, *shape] from noise in S steps, and intermediate results {"x_inter", "pred_x0"}.

        shape: (c, h, w). conditioning: see `guided`. mask [b, 1 or c, h, w]: 1 keeps `x0` [b, c, h, w]. x_T [b, c, h,
        w]: the noise to start from. generator: see `draw`; by default the global one of the CPU. Intermediate results
        are kept every `log_every_t` updates and at the end. callback(i) and img_callback(pred_x0, i) are called after
        every update. normals_sequence has no effect, as in LDM. Raises `InputError`.
        """
        if kwargs:
            log.warning("%s.sample: arguments without effect: %s", type(self).__name__, ", ".join(sorted(kwargs)))
        _check_batch(conditioning, batch_size)
        if mask is not None and x0 is None:
            raise InputError("sampling with a mask needs x0, the latents to keep where the mask is 1")
        if noise_dropout and generator is not None:
            raise InputError("noise_dropout draws from the global generator: use it without generator=")
        self.make_schedule(S, ddim_eta=eta, verbose=verbose)

        draw_noise = partial(draw, (batch_size, *shape), self.device, generator)
        x = draw_noise() if x_T is None else x_T.to(self.device)
        for name, given in (("x_T", x), ("x0", x0 if mask is not None else None), ("mask", mask)):
            if given is not None and not _fits(given, (batch_size, *shape), broadcast=name == "mask"):
                raise InputError(f"{name} has shape {list(given.shape)}, the samples have {[batch_size, *shape]}")
        denoise = self.guided(conditioning, unconditional_conditioning, unconditional_guidance_scale)
        if score_corrector is not None:
            denoise = _corrected(denoise, score_corrector, self.model, conditioning, corrector_kwargs or {})
        trace = Trace(x, log_every_t, callback, img_callback)
        samples = self.row.function(
            denoise,
            x,
            self.steps,
            changed(draw_noise, temperature, noise_dropout),
            Parts(
                blend=unchanged if mask is None else keep_known(x0.to(x), mask.to(x), draw_noise),
                fix_x0=_quantizer(self.model) if quantize_x0 else unchanged,
                on_step=trace,
                progress=self.progress(verbose),
            ),
        )
        return samples, trace.intermediates

    def progress(self, verbose: bool) -> Progress:
        """A progress bar around the steps."""
        return partial(tqdm, desc=type(self).__name__, disable=not verbose)


class DDIMSchedule(LatentSampler):
    """A sampler that visits the steps of DDIM."""

    def make_schedule(
        self, ddim_num_steps: int, ddim_discretize: str = "uniform", ddim_eta: float = 0.0, verbose: bool = True
    ) -> None:
        """Choose the steps to visit and keep their numbers under LDM's names; called by `sample`."""
        alphas_cumprod = self.model.alphas_cumprod
        self.steps = self.row.steps(alphas_cumprod, ddim_num_steps, ddim_eta, spacing=ddim_discretize)
        self.ddim_eta = ddim_eta
        self.ddim_timesteps = np.array([step.t for step in self.steps[::-1]])
        self.ddim_sigmas, self.ddim_alphas, self.ddim_alphas_prev = make_ddim_sampling_parameters(
            alphas_cumprod.detach().cpu().float(), self.ddim_timesteps, ddim_eta
        )


def changed(draw_noise: Draw, temperature: float, dropout: float) -> Draw:
    """The noise of updates, multiplied by `temperature` and with dropout (LDM's options)."""
    if temperature == 1 and dropout == 0:
        return draw_noise
    return lambda: F.dropout(temperature * draw_noise(), p=dropout)


class Trace:
    """Called after every update: keeps every `log_every_t`-th result and the last, and calls LDM's callbacks."""

    def __init__(self, x: Tensor, log_every_t: int, callback: Callable | None, img_callback: Callable | None):
        self.intermediates = {"x_inter": [x], "pred_x0": [x]}
        self.log_every_t, self.callback, self.img_callback = log_every_t, callback, img_callback

    def __call__(self, i: int, total: int, x: Tensor, pred_x0: Tensor) -> None:
        if self.callback:
            self.callback(i)
        if self.img_callback:
            self.img_callback(pred_x0, i)
        left = total - 1 - i
        if left % self.log_every_t == 0 or i == 0:  # LDM counts from the end, and keeps the first
            self.intermediates["x_inter"].append(x)
            self.intermediates["pred_x0"].append(pred_x0)


def _quantizer(model: Any) -> Callable[[Tensor], Tensor]:
    """Snaps latents to the codebook of a VQ first stage."""
    return lambda x0: model.first_stage_model.quantize(x0)[0]


def _corrected(denoise: Denoise, corrector: Any, model: Any, cond: Any, kwargs: dict) -> Denoise:
    """LDM's hook for changing the predicted noise: corrector.modify_score(model, eps, x, t, cond, **kwargs)."""
    return lambda x, t: corrector.modify_score(model, denoise(x, t), x, t, cond, **kwargs)


def _fits(tensor: Tensor, size: tuple[int, ...], broadcast: bool) -> bool:
    pairs = zip(tensor.shape, size, strict=False)
    return tensor.dim() == len(size) and all(n == m or (broadcast and n == 1) for n, m in pairs)


def _check_batch(cond: Any, batch_size: int) -> None:
    if isinstance(cond, dict):
        cond = list(cond.values())
    if isinstance(cond, (list, tuple)):
        for entry in cond:
            _check_batch(entry, batch_size)
    elif isinstance(cond, Tensor) and len(cond) != batch_size:
        raise InputError(f"the conditioning is for {len(cond)} samples, batch_size is {batch_size}: they must agree")
