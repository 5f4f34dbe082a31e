"""The loops that train SD-mini's autoencoder and its UNet on one device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.data.captioned import CaptionedPictures
from ldm.muon import Muon
from ldm.train.compiled import compile_module
from scripts.sd_mini.on_device.clock import Clock
from scripts.sd_mini.on_device.draws import EncodedDraws, encode_pictures

log = logging.getLogger(__name__)

EVERY = 50  # steps between two looks at the clock and at the loss, which wait for the device


def autocast(device: torch.device) -> AbstractContextManager:
    """bf16 on a GPU; on a CPU, where the loops only run in tests, the model's own precision."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


class Averages:
    """Exponential moving averages of parameters; as LDM's, the decay is (1 + n) / (10 + n), at most `decay`."""

    def __init__(self, parameters: list[nn.Parameter], decay: float = 0.999, updates: int = 0) -> None:
        self.decay, self.updates = decay, updates
        self.parameters = parameters
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters and their averages."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def steps(clock: Clock, optimizer: torch.optim.Optimizer, rate: float) -> Iterator[int]:
    """Step numbers until the time is over. The optimizer's rate is set for each."""
    step = 0
    while not clock.over:
        for group in optimizer.param_groups:
            group["lr"] = rate * clock.rate(step)
        yield step
        if step == 0:
            clock.begin()
        step += 1


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """One step of an optimizer, with the gradient's norm clipped at 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
    optimizer.step()


def train_autoencoder(
    first_stage: nn.Module, pictures: CaptionedPictures, clock: Clock, batch_size: int, rate: float, first: int = 0
) -> int:
    """Train encoder and decoder on draws from `first` on; the number of steps.

    The loss is that of `configs/sd-mini/train/autoencoder.yaml` without its discriminator: absolute and squared
    errors, and 0.001 of the KL divergence, all summed over a picture.
    """
    device, parameters = pictures.pixels.device, [p for p in first_stage.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type == "cuda")
    averages = Averages(parameters)
    first_stage.train()
    step = 0
    for step in steps(clock, optimizer, rate):
        images = pictures.batch(range(first + step * batch_size, first + (step + 1) * batch_size))["image"]
        with autocast(device):
            posterior = encode_pictures(first_stage, images)
            sample = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
            rebuilt = first_stage.decode(sample)
        target = images.movedim(-1, 1)
        errors = rebuilt.float() - target
        loss = (errors.abs() + errors.square()).flatten(1).sum(1).mean() + 0.001 * posterior.kl().float().mean()
        descend(loss / target[0].numel(), optimizer, parameters)
        averages.update()
        if step % (10 * EVERY) == 0:
            log.info("autoencoder, step %d (%.0f %%): loss per value %.4f", step, 100 * clock.passed,
                     loss.item() / target[0].numel())  # fmt: skip
    averages.swap()
    first_stage.eval()
    return step + 1


def train_unet(
    model: Any,
    draws: EncodedDraws,
    clock: Clock,
    batch_size: int,
    optimizer: Muon,
    averages: Averages,
    rate: float,
    ucg_rate: float = 0.1,
    compile_mode: str | None = None,
    before_decay: Callable[[int], None] = lambda step: None,
) -> int:
    """Train the UNet on encoded draws until the time is over; the number of steps.

    The loss is the model's own. `before_decay` is called once with the step, when the rate begins to fall.
    """
    unet, device = model.model.diffusion_model, draws.means.device
    parameters = list(unet.parameters())
    if compile_mode is None:
        unet.to(memory_format=torch.channels_last)
    else:
        compile_module(unet, compile_mode)
    unet.train()
    step, total, told = 0, torch.zeros((), device=device), False
    for step in steps(clock, optimizer, rate):
        if clock.decaying and not told:
            before_decay(step)
            told = True
        x, context = draws.batch(batch_size, ucg_rate)
        t = torch.randint(model.num_timesteps, (batch_size,), device=device)
        noise = torch.randn_like(x)
        with autocast(device):
            predicted = model.apply_model(model.q_sample(x, t, noise), t, context)
        loss, _ = model.loss_of(predicted, x, noise, t)
        descend(loss, optimizer, parameters)
        averages.update()
        total += loss.detach()
        if (step + 1) % EVERY == 0:
            mean = total.item() / EVERY  # waits for the device, so that the clock is the device's too
            total.zero_()
            if (step + 1) % (10 * EVERY) == 0:
                log.info("UNet, step %d (%.0f %%): loss %.5f", step + 1, 100 * clock.passed, mean)
    unet.eval()
    return step + 1


@torch.no_grad()
def held_out_loss(model: Any, draws: EncodedDraws, batch_size: int, seed: int = 0) -> float:
    """The mean squared error of the predicted noise over all `draws`, at one time step and noise each by `seed`.

    Mode of each posterior, every caption shown. Losses of two models compare, since both see the same steps and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    device, errors = draws.means.device, []
    for start in range(0, len(draws), batch_size):
        x = draws.means[start : start + batch_size].float()
        t = torch.randint(model.num_timesteps, (len(x),), generator=generator).to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        context = draws.contexts[draws.caption[start : start + batch_size]].float()
        predicted = model.apply_model(model.q_sample(x, t, noise), t, context)
        errors.append(F.mse_loss(predicted.float(), noise, reduction="none").flatten(1).mean(1))
    return torch.cat(errors).mean().item()
