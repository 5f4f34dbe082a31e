"""The visible progress of a run: sample pictures, and one line per epoch."""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from ldm import generate
from ldm.devices import forked_rng
from ldm.errors import InputError

log = logging.getLogger(__name__)


class ImageLogger(pl.Callback):
    """Samples fixed prompts with fixed seeds every `batch_frequency` steps. The grids go to `images/` and TensorBoard.

    `prompts`: by default a caption of the subject and one of its class. Each prompt is a row of `max_images //
    len(prompts)` pictures. `increase_log_steps` also samples at steps 1, 2, 4, ... below the frequency, as in LDM. For
    a model that is no diffusion model but has `log_images`, such as a first stage, the rows are the results of that
    method. `log_images_kwargs` are its arguments, or LDM's names for the settings of sampling.
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
        clamp: bool = True,  # unused, as `rescale`: LDM's arguments for pictures outside [0, 1]
        rescale: bool = True,
        log_on_batch_idx: bool = False,
        log_images_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(batch_frequency, int) or batch_frequency < 1:
            raise InputError(f"batch_frequency of the image logger must be at least 1, got {batch_frequency!r}")
        self.every, self.max_images, self.disabled = batch_frequency, max_images, disabled
        self.early = {2**n for n in range(batch_frequency.bit_length())} if increase_log_steps else set()
        self.early |= {1} if log_first_step else set()
        self.prompts, self.seed = list(prompts or []), seed
        self.kwargs = dict(log_images_kwargs or {})
        words = {"ddim_steps": "steps", "ddim_eta": "eta", "unconditional_guidance_scale": "scale"}
        given = {words[name]: value for name, value in self.kwargs.items() if name in words}
        self.settings = generate.Settings(**{"steps": steps, "scale": scale} | given)
        self.folders = [Path("images")]  # one for each training; the run sets its own
        self.drawn_at = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step in self.early
        if due and step != self.drawn_at and not self.disabled and trainer.is_global_zero:
            self.drawn_at = step
            self.draw(trainer, module, batch)

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        """Write the grid of this step for each training."""
        for number, one in enumerate(getattr(module, "trainings", [module])):
            self.draw_one(trainer, one, batch, number)

    def draw_one(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, number: int) -> None:
        try:
            own = hasattr(module, "log_images") and not hasattr(module, "apply_model")
            rows = self.of_batch(module, batch) if own else self.of_prompts(trainer, module, number)
        except generate.NotFinite as error:
            log.warning("no sample pictures at step %d: %s", trainer.global_step, error)
            return
        if not rows:
            log.warning("no sample pictures: neither the image logger nor the data has a prompt")
            self.disabled = True
            return
        pictures = list(rows.values())
        grid = generate.grid(list(torch.cat(pictures)), columns=len(pictures[0]))
        path = self.folders[number] / f"{trainer.global_step:06}.png"
        generate.save_png(grid, path, {"prompt": " | ".join(rows), "step": trainer.global_step})
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                name = f"samples_{number}" if len(self.folders) > 1 else "samples"
                logger.experiment.add_image(name, grid, trainer.global_step)

    def of_prompts(self, trainer: pl.Trainer, module: pl.LightningModule, number: int) -> dict[str, torch.Tensor]:
        """Samples [n, 3, H, W] in [0, 1] of each prompt; none where there are no prompts."""
        prompts = list(dict.fromkeys(self.prompts or trainer.datamodule.captions(number)))
        if not prompts:
            return {}
        each = max(1, self.max_images // len(prompts))
        texts = [prompt for prompt in prompts for _ in range(each)]
        seeds = [self.seed + i for _ in prompts for i in range(each)]
        return dict(zip(prompts, generate.generate(module, texts, seeds, self.settings).split(each), strict=True))

    @torch.no_grad()
    def of_batch(self, module: pl.LightningModule, batch: Any) -> dict[str, torch.Tensor]:
        """The result of the model's `log_images`, in [0, 1]. The mode and the random states stay as they were."""
        with generate.evaluating(module), forked_rng(module.device):
            shown = module.log_images(batch, **self.kwargs)
        for name, one in shown.items():
            if not torch.isfinite(one).all():
                raise generate.NotFinite(f"{name} of {type(module).__name__}", module, False)
        return {name: ((one[: self.max_images].float() + 1) / 2).clamp(0, 1).cpu() for name, one in shown.items()}


class EpochReport(pl.Callback):
    """Logs one line per epoch: mean loss, validation loss, steps per second, peak memory of the device."""

    def __init__(self) -> None:
        self.seconds, self.steps = 0.0, 0  # of all epochs that have ended

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.on_train_epoch_start(trainer, module)  # Lightning does not call it for the rest of a resumed epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.start, self.first_step = time.perf_counter(), trainer.global_step
        self.losses: list[torch.Tensor] = []
        self.validated: dict[str, float] = {}
        if module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        if outputs and "loss" in outputs:
            # The loss is still on the device. Lightning has divided it by the number of accumulated batches.
            self.losses.append(outputs["loss"] * trainer.accumulate_grad_batches)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if "val/loss" in trainer.callback_metrics:
            self.validated = {"val/loss": float(trainer.callback_metrics["val/loss"])}
            if not math.isfinite(self.validated["val/loss"]):
                log.warning("the loss of validation is %s at step %d", self.validated["val/loss"], trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        seconds, steps = time.perf_counter() - self.start, trainer.global_step - self.first_step
        self.seconds, self.steps = self.seconds + seconds, self.steps + steps
        values = {"loss": trainer.strategy.reduce(torch.stack(self.losses).mean())} if self.losses else {}
        values |= self.validated
        if trainer.is_global_zero:
            log.info(
                "epoch %d: %s%d steps in %.1f s (%.2f steps/s), peak memory %.2f GiB (%s)", trainer.current_epoch,
                "".join(f"{name} {float(value):.4f}, " for name, value in values.items()),
                steps, seconds, steps / seconds, peak_memory(module.device), module.device.type,
            )  # fmt: skip


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GiB: on a CUDA device since the last reset, on other devices since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
