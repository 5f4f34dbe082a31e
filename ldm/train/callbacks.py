"""Sample pictures of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from ldm import generate
from ldm.devices import forked_rng
from ldm.errors import InputError
from ldm.sheets import labelled_rows
from ldm.train.loggers import log_picture
from ldm.train.reporting import EpochReport, peak_memory  # noqa: F401 (configs name it here)
from ldm.train.sample_prompts import SamplePrompt, sample_prompt

log = logging.getLogger(__name__)

SMALLEST, LARGEST = 96, 1024  # pixels of a picture on a sheet
FIRST = "step-0"  # folder of the pictures that were drawn before the first step


class ImageLogger(pl.Callback):
    """Samples fixed prompts with fixed seeds every `batch_frequency` steps. The sheets go to `images/` and the loggers.

    `prompts`: by default a caption of the subject and one of its class; settings may follow them, see
    `ldm.train.sample_prompts`. Each prompt is a row of `max_images // len(prompts)` pictures, under its caption.
    `ends`: also a sheet before the first step and one at the end, whatever the interval; then each row stands below
    that of step 0, and photographs are on top. `increase_log_steps` also samples at steps 1, 2, 4, ... below the
    frequency, as in LDM. For a model that is no diffusion model but has `log_images`, such as a first stage, the rows
    are the results of that method. `log_images_kwargs` are its arguments, or LDM's names for the settings of sampling.
    """

    def __init__(
        self,
        batch_frequency: int,
        max_images: int = 4,
        increase_log_steps: bool = False,
        log_first_step: bool = False,
        disabled: bool = False,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        steps: int = 50,
        scale: float = 7.5,
        ends: bool = True,
        clamp: bool = True,  # unused, as `rescale`: LDM's arguments for pictures outside [0, 1]
        rescale: bool = True,
        log_on_batch_idx: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(batch_frequency, int) or batch_frequency < 1:
            raise InputError(f"batch_frequency of the image logger must be at least 1, got {batch_frequency!r}")
        self.every, self.max_images, self.disabled, self.ends = batch_frequency, max_images, disabled, ends
        self.early = {2**n for n in range(batch_frequency.bit_length())} if increase_log_steps else set()
        self.early |= {1} if log_first_step else set()
        self.prompts, self.seed = [sample_prompt(line) for line in prompts or []], seed
        self.kwargs = dict(log_images_kwargs or {})
        words = {"ddim_steps": "steps", "ddim_eta": "eta", "unconditional_guidance_scale": "scale"}
        given = {words[name]: value for name, value in self.kwargs.items() if name in words}
        self.settings = generate.Settings(**{"steps": steps, "scale": scale} | given)
        self.folders = [Path("images")]  # one for each training; the run sets its own
        self.drawn_at: int | None = None
        self.batch: Any = None  # the last one, for models that draw what they make of it

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.ends and trainer.global_step == 0 and not shows_batches(module):
            self.draw(trainer, module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.batch = batch if shows_batches(module) else None
        step = trainer.global_step
        if step % self.every == 0 or step in self.early:
            self.draw(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        has_time = not any(getattr(one, "stopped", False) for one in trainer.callbacks)  # no signal has asked to leave
        if self.ends and has_time and trainer.global_step:
            self.draw(trainer, module)
        self.batch = None

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write the sheet of this step for each training, unless it is there already."""
        step = trainer.global_step
        if self.disabled or not trainer.is_global_zero or step == self.drawn_at:
            return
        self.drawn_at = step
        for number, one in enumerate(getattr(module, "trainings", [module])):
            try:
                self.draw_one(trainer, one, number)
            except generate.NotFinite as error:
                log.warning("no sample pictures at step %d: %s", step, error)

    def draw_one(self, trainer: pl.Trainer, module: pl.LightningModule, number: int) -> None:
        folder, step = self.folders[number], trainer.global_step
        own = shows_batches(module)
        drawn = self.of_batch(module, self.batch) if own else self.of_prompts(trainer, module, number)
        if not drawn:
            log.warning("no sample pictures: neither the image logger nor the data has a prompt")
            self.disabled = True
            return
        rows = drawn if own else self.with_others(trainer, drawn, number)
        side = min(max(SMALLEST, max(row[0].shape[-1] for row in drawn.values())), LARGEST)
        sheet = generate.from_pil(labelled_rows(rows, side))
        generate.save_png(sheet, folder / f"{step:06}.png", {"prompt": " | ".join(drawn), "step": step})
        name = f"samples_{number}" if len(self.folders) > 1 else "samples"
        for logger in trainer.loggers:
            log_picture(logger, name, sheet, step)

    def with_others(
        self, trainer: pl.Trainer, drawn: Mapping[str, Sequence[Tensor]], number: int
    ) -> dict[str, Sequence[Tensor]]:
        """The rows of a sheet: photographs, and for each prompt the pictures of step 0 above those of this step."""
        step, folder = trainer.global_step, self.folders[number] / FIRST
        if step == 0:
            keep(drawn, folder)
        photographs = trainer.datamodule.photographs(max(map(len, drawn.values())), number) if self.ends else []
        rows: dict[str, Sequence[Tensor]] = {"photographs": photographs} if photographs else {}
        for place, (prompt, pictures) in enumerate(drawn.items()):
            if step and self.ends and (first := kept(folder, place, prompt)):
                rows[f"step 0: {prompt}"] = first
            rows[f"step {step}: {prompt}"] = pictures
        return rows

    def of_prompts(self, trainer: pl.Trainer, module: pl.LightningModule, number: int) -> dict[str, Sequence[Tensor]]:
        """Samples [3, H, W] in [0, 1] of each prompt; none where there are no prompts."""
        own = [SamplePrompt(text) for text in dict.fromkeys(trainer.datamodule.captions(number))]
        prompts = self.prompts or own
        each = max(1, self.max_images // max(1, len(prompts)))
        drawn = {}
        for one in prompts:
            first = self.seed if one.seed is None else one.seed
            seeds, settings = range(first, first + each), one.settings_over(self.settings)
            negative = [one.negative] * each if one.negative else None
            pictures = generate.generate(module, [one.text] * each, seeds, settings, negative=negative)
            label = one.text if one.text not in drawn else f"{one.text} ({len(drawn)})"
            drawn[label] = list(pictures)
        return drawn

    @torch.no_grad()
    def of_batch(self, module: pl.LightningModule, batch: Any) -> dict[str, Sequence[Tensor]]:
        """The result of the model's `log_images`, in [0, 1]. The mode and the random states stay as they were."""
        with generate.evaluating(module), forked_rng(module.device):
            shown = module.log_images(batch, **self.kwargs)
        for name, one in shown.items():
            if not torch.isfinite(one).all():
                raise generate.NotFinite(f"{name} of {type(module).__name__}", module, False)
        return {name: list(((one[: self.max_images].float() + 1) / 2).clamp(0, 1).cpu()) for name, one in shown.items()}


def shows_batches(module: pl.LightningModule) -> bool:
    """Whether a model draws what it makes of a batch, as first stages do."""
    return hasattr(module, "log_images") and not hasattr(module, "apply_model")


def keep(drawn: Mapping[str, Sequence[Tensor]], folder: Path) -> None:
    """Write single pictures, so that a resumed run has them, too."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, (prompt, pictures) in enumerate(drawn.items()):
        for number, picture in enumerate(pictures):
            generate.save_png(picture, folder / f"{place:02}-{number}.png", {"prompt": prompt})


def kept(folder: Path, place: int, prompt: str) -> list[Tensor]:
    """The pictures that `keep` wrote for a prompt; none if they are of another one."""
    found = []
    for path in sorted(folder.glob(f"{place:02}-*.png")):
        with Image.open(path) as picture:
            if picture.text.get("prompt") == prompt:
                found.append(generate.from_pil(picture.convert("RGB")))
    return found
