"""Draws pictures from prompts: seeds, guidance, samplers, grids and files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm.checkpoints import atomic_write
from ldm.data.class_images import missing_class_images
from ldm.errors import InputError, WriteError
from ldm.models.diffusion.from_picture import last_steps
from ldm.models.diffusion.guidance import guided
from ldm.models.diffusion.inpainting import painting_condition, sees_mask
from ldm.models.diffusion.sampler_parts import Blend, Draw, Parts, unchanged
from ldm.models.diffusion.samplers import draw, keep_known, sampler
from ldm.modules.cached_text import cached_text
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.writing import printable, writing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Settings of sampling. Height and width are in pixels, by default the size of training."""

    sampler: str = "ddim"
    steps: int = 50
    eta: float | None = None  # by default that of the sampler: 1 for ancestral samplers, else 0
    scale: float = 7.5
    height: int | None = None
    width: int | None = None
    channels: int | None = None  # of the latents; by default the model's
    factor: int | None = None  # pixels per latent; by default the autoencoder's
    spacing: str = "uniform"  # of the steps
    weighted: bool = False  # (word:1.3) in a prompt is a weight
    half: bool = False  # autocast, only on CUDA
    cache_text: bool = True  # compute the keys and values of the text once, not at every step
    decoded_pixels: int = 512 * 512  # limit for all pictures that the autoencoder decodes at once

    def factor_of(self, model: Any) -> int:
        """Pixels per latent, along one side."""
        return self.factor or getattr(model.first_stage_model, "downsampling_factor", 1)

    def latent_shape(self, model: Any) -> tuple[int, int, int]:
        """(c, h, w) of the latents. Raises `InputError` for a size that the UNet cannot halve often enough."""
        factor = self.factor_of(model)
        height, width = (size or model.image_size * factor for size in (self.height, self.width))
        step = factor * model.model.diffusion_model.downsampling_factor
        if height % step or width % step or min(height, width) < step:
            raise InputError(f"the picture size {height}x{width} does not fit this model: expected multiples of {step}")
        if self.channels not in (None, model.channels):
            raise InputError(f"latents of this model have {model.channels} channels, not {self.channels}")
        return model.channels, height // factor, width // factor


class NotFinite(InputError):
    """A part of the model gave numbers that are not finite, so there is no picture."""

    def __init__(self, part: str, model: Any, half: bool) -> None:
        bad = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
        halves = half or any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
        if bad:
            cause = f"its weight {bad[0]} is not finite: check the file that holds it"
        elif halves:
            cause = "half precision may overflow: try --precision full, or weights in fp32"
        else:
            cause = "try another adapter, a lower scale of it, or another seed"
        super().__init__(f"{part} gave numbers that are not finite (nan or infinite), so no picture is made; {cause}")


@dataclass(frozen=True)
class Start:
    """A picture as the start of sampling, and the area to paint.

    picture [3, H, W] in [0, 1]; strength: the fraction of steps to make, 1 starts from pure noise; mask [1, H, W]: 1
    where the model paints, elsewhere the picture stays; without a mask it paints everything.
    """

    picture: Tensor
    strength: float = 0.75
    mask: Tensor | None = None

    def with_known(self, pictures: Tensor) -> Tensor:
        """Pictures [b, 3, H, W] in [0, 1] with the unmasked area of the start."""
        return pictures if self.mask is None else self.mask * pictures + (1 - self.mask) * self.picture


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    verbose: bool = False,
    negative: Sequence[str] | None = None,
    start: Start | None = None,
) -> Tensor:
    """Pictures [b, 3, H, W] in [0, 1] on the CPU, one for each prompt and seed.

    `negative`: a negative prompt for each prompt. `start`: a picture instead of noise.
    Each picture has its own generator, so it does not depend on its batch.
    Raises `InputError` for settings that the model or the sampler does not support, and `NotFinite`.
    """
    row = sampler(settings.sampler)
    if getattr(model, "cond_stage_model", None) is None:
        raise InputError("this model has no text encoder, so it cannot draw prompts")
    device = model.betas.device
    half = settings.half and device.type == "cuda"
    precision = torch.autocast(device.type, dtype=torch.float16) if half else nullcontext()
    remembering = cached_text(model.model.diffusion_model) if settings.cache_text else nullcontext()
    if start is not None:
        height, width = start.picture.shape[1:]
        settings = replace(settings, height=height, width=width)
    with evaluating(model), model.ema_scope(), precision, remembering:
        shape = settings.latent_shape(model)
        condition, empty = _conditions(model, prompts, negative, settings, start)
        given = condition.values() if isinstance(condition, Mapping) else [condition]
        if not all(torch.isfinite(part).all() for part in given if isinstance(part, Tensor)):
            raise NotFinite("the text encoder", model, half)
        steps = row.steps(model.alphas_cumprod, settings.steps, settings.eta, spacing=settings.spacing)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draw_noise = partial(draw, (len(prompts), *shape), device, generators)
        x, blend = draw_noise(), unchanged
        if start is not None:
            steps, x, blend = _from_picture(model, start, steps, x, draw_noise)
        denoise = guided(model.predict_noise, condition, empty, settings.scale)
        finite = FiniteSteps()
        progress = partial(tqdm, desc=row.title, disable=not verbose)
        parts = Parts(blend, on_step=finite, progress=progress)
        latents = row.function(denoise, x, steps, draw_noise, parts)
        if not torch.isfinite(latents).all():
            raise NotFinite(f"the UNet{finite.first_bad()}", model, half)
        pictures = decoded(model, latents, settings.decoded_pixels)
        if not torch.isfinite(pictures).all():
            raise NotFinite("the first stage", model, half)
    pictures = ((pictures.float() + 1) / 2).clamp(0, 1).cpu()
    return pictures if start is None else start.with_known(pictures)


class FiniteSteps:
    """Records for each step whether the estimate of x_0 was finite."""

    def __init__(self) -> None:
        self.flags: list[Tensor] = []  # on the device; reading them would wait for it

    def __call__(self, i: int, total: int, x: Tensor, pred_x0: Tensor) -> None:
        self.flags.append(torch.isfinite(pred_x0).all())

    def first_bad(self) -> str:
        """` at step i of n`; empty if all were finite."""
        seen = torch.stack(self.flags).tolist() if self.flags else []
        return f" at step {seen.index(False) + 1} of {len(seen)}" if False in seen else ""


def _conditions(
    model: Any, prompts: Sequence[str], negative: Sequence[str] | None, settings: Settings, start: Start | None
) -> tuple[Any, Any]:
    """The conditions with and without the prompts; the second is None without guidance."""
    shape = settings.latent_shape(model)
    pixels = tuple(side * settings.factor_of(model) for side in shape[1:])
    is_guided, sees = settings.scale != 1, sees_mask(model)
    if sees and (start is None or start.mask is None):
        raise InputError("this is an inpainting model: give it a picture and a mask")
    if sees and model.cond_stage_model is model.first_stage_model:  # no text
        condition = empty = None
    else:
        condition, empty = model.conditions(prompts, pixels, is_guided, negative, settings.weighted)
    if not sees:
        return condition, empty
    picture, mask = (one.expand(len(prompts), -1, -1, -1).to(model.betas.device)
                     for one in (2 * start.picture - 1, start.mask))  # fmt: skip
    painted = painting_condition(model, condition, picture, mask)
    return painted, None if empty is None else {**painted, "c_crossattn": [empty]}


def _from_picture(model: Any, start: Start, steps: Any, noise: Tensor, draw_noise: Draw) -> tuple[Any, Tensor, Blend]:
    """The remaining steps, their initial latents, and the function that keeps the picture outside the mask."""
    picture = (2 * start.picture - 1).expand(len(noise), -1, -1, -1).to(noise)
    if start.mask is not None and sees_mask(model):
        return steps, noise, unchanged  # the picture is in its condition
    posterior = model.encode_first_stage(picture)
    is_random = isinstance(posterior, DiagonalGaussianDistribution)
    latents = model.scale_factor * (posterior.sample(noise=draw_noise()) if is_random else posterior)
    blend = unchanged
    if start.mask is not None:
        open_places = F.interpolate(start.mask[None].to(noise), size=noise.shape[2:])
        blend = keep_known(latents, 1 - open_places, draw_noise)
    if start.strength == 1:
        return steps, noise, blend
    steps, alpha_bar = last_steps(steps, start.strength)
    return steps, alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * noise, blend


def decoded(model: Any, latents: Tensor, pixels: int) -> Tensor:
    """Pictures from latents [b, c, h, w], decoded in parts of at most `pixels` pixels, but at least one picture.

    The autoencoder of Stable Diffusion needs about 1 GB for each picture of 512 x 512 in fp32.
    """
    size = latents.shape[-2] * latents.shape[-1] * getattr(model.first_stage_model, "downsampling_factor", 1) ** 2
    return torch.cat([model.decode_first_stage(part) for part in latents.split(max(1, pixels // size))])


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within this context, the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def batches(
    prompts: Sequence[str], per_prompt: int, rounds: int, seed: int, fixed_code: bool = False
) -> Iterator[tuple[list[str], list[int]]]:
    """Prompts and seeds, `per_prompt` pictures at a time: every prompt, `rounds` times over.

    Seeds count up from `seed` over all pictures; with `fixed_code` each batch starts from the same ones.
    """
    first = seed
    for _ in range(rounds):
        for prompt in prompts:
            yield [prompt] * per_prompt, list(range(first, first + per_prompt))
            first += 0 if fixed_code else per_prompt


def to_pil(picture: Tensor) -> Image.Image:
    """A picture [3, H, W] in [0, 1] as PIL. Raises `InputError` for numbers that are not finite, which would be black.
    """
    if not torch.isfinite(picture).all():
        raise InputError("a picture has numbers that are not finite (nan or infinite), so it is not written")
    return Image.fromarray(rearrange((picture * 255).round().byte(), "c h w -> h w c").cpu().numpy())


def from_pil(picture: Image.Image) -> Tensor:
    """An RGB picture of PIL as [3, H, W] in [0, 1]."""
    return rearrange(torch.from_numpy(np.array(picture)), "h w c -> c h w").float() / 255


def grid(pictures: Sequence[Tensor], columns: int, gap: int = 2) -> Tensor:
    """Pictures [3, H, W] of one size as one [3, rows * H, columns * W] with white gaps, row by row."""
    columns = max(1, min(columns, len(pictures)))
    empty = [torch.ones_like(pictures[0])] * (-len(pictures) % columns)
    framed = torch.nn.functional.pad(torch.stack([*pictures, *empty]), (gap,) * 4, value=1.0)
    return rearrange(framed, "(rows columns) c h w -> c (rows h) (columns w)", columns=columns)


def save_png(picture: Tensor, path: Path, metadata: Mapping[str, Any], new: bool = False) -> None:
    """Write a picture [3, H, W] in [0, 1] as PNG, with `metadata` as text chunks; see `atomic_write`."""
    chunks = PngInfo()
    for key, value in metadata.items():
        chunks.add_itxt(key, printable(str(value)))
    with atomic_write(path, new) as beside:
        to_pil(picture).save(beside, format="PNG", pnginfo=chunks)


def save_numbered(picture: Tensor, folder: Path, name: str, number: int, metadata: Mapping[str, Any]) -> int:
    """`save_png` under the first free name from `number` on. Returns its number. `name` is e.g. `{:05}.png`.

    Two programs that write into one folder at the same time get different numbers.
    """
    while True:
        path = folder / name.format(number)
        try:
            save_png(picture, path, metadata, new=True)
            return number
        except WriteError:
            if not path.exists():
                raise
            number += 1


def next_number(folder: Path, pattern: str = "*.png") -> int:
    """The number that follows the highest one in file names such as 00007.png or grid-0003.png."""
    numbers = [int(path.stem.rpartition("-")[2]) for path in folder.glob(pattern) if path.stem[-1:].isdigit()]
    return max(numbers, default=-1) + 1


def fill_class_folder(
    model: Any, folder: Path, prompt: str, number: int, settings: Settings, seed: int, batch_size: int = 4
) -> None:
    """Fill a folder with class pictures by sampling the base model (DreamBooth's prior preservation).

    Existing pictures are kept, so an interrupted run continues where it stopped. Adapters are off meanwhile.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    names = missing_class_images(folder, number)
    unet = model.model.diffusion_model
    unet.adapters_enable(False)
    try:
        with tqdm(total=len(names), desc=f"class pictures: {prompt}", disable=not names) as progress:
            for start in range(0, len(names), batch_size):
                chunk = names[start : start + batch_size]
                seeds = [seed + int(Path(name).stem) for name in chunk]
                for name, one, picture in zip(
                    chunk, seeds, generate(model, [prompt] * len(chunk), seeds, settings), strict=True
                ):
                    save_png(picture, folder / name, {"prompt": prompt, "seed": one})
                progress.update(len(chunk))
    except (KeyboardInterrupt, SystemExit):
        there = number - len(missing_class_images(folder, number))
        log.info("%d of %d class pictures are in %s; the same command draws the rest", there, number, folder)
        raise
    finally:
        unet.adapters_enable(True)
