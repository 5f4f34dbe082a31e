"""Compiles parts of a model with `torch.compile`, as the config or the command line names them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldm.cli import COMPILE_MODES
from ldm.errors import InputError
from ldm.modules.diffusionmodules import model, openaimodel


class ChannelsLast(pl.Callback):
    """Puts the convolutions of modules into the memory format `channels_last`.

    Modules are named as in the model, e.g. `model.diffusion_model`. With many small pictures this is faster on a CPU
    too. Raises `InputError` for a name that the model does not have.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.modules = modules

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for name in self.modules:
            try:
                part = pl_module.get_submodule(name)
            except AttributeError:
                kind = type(pl_module).__name__
                raise InputError(f"callback {type(self).__name__}: {kind} has no module {name!r}") from None
            self.change(part)

    def change(self, module: nn.Module) -> None:
        module.to(memory_format=torch.channels_last)


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")  # modes that replay CUDA graphs, which reuse their output memory


class Compiled(ChannelsLast):
    """Compiles modules, named as in the model, and puts their convolutions into the memory format `channels_last`.

    This helps on CPUs too, where group norms take most of a small model's step without it. State-dict names do not
    change. Raises `InputError` for a name that the model does not have and for an unknown mode.
    """

    def __init__(self, modules: Sequence[str], mode: str = "default") -> None:
        super().__init__(modules)
        self.mode = mode

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # The adaptive weight of a discriminator differentiates a graph twice, so its buffers must not be donated.
        torch._functorch.config.donated_buffer = False
        super().setup(trainer, pl_module, stage)
        if self.mode in CUDA_GRAPHS and trainer.accumulate_grad_batches > 1:
            for name in self.modules:
                own_gradients(pl_module.get_submodule(name))

    def change(self, module: nn.Module) -> None:
        compile_module(module, self.mode)


def compile_module(module: nn.Module, mode: str = "default") -> None:
    """Compile `module` in place at its first call, with convolutions in the memory format `channels_last`."""
    if mode not in COMPILE_MODES:
        raise InputError(f"unknown mode {mode!r} of compilation: expected {', '.join(COMPILE_MODES)}")
    for part in module.modules():
        if isinstance(part, (model.Upsample, openaimodel.Upsample)):
            part.forward = partial(upsample, part)
    module.to(memory_format=torch.channels_last)
    module.compile(mode=mode)


def own_gradients(module: nn.Module) -> None:
    """Let gradients of what learns be copies: those that a CUDA graph gives are overwritten by its next replay, before
    the gradients of several batches are summed."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(torch.clone)


def upsample(module: nn.Module, x: Tensor) -> Tensor:
    """What `Upsample` does, by repetition: the compiled gradient of F.interpolate is 0 on CPUs (torch 2.13, bf16)."""
    b, c, h, w = x.shape
    return module.conv(x[:, :, :, None, :, None].expand(b, c, h, 2, w, 2).reshape(b, c, 2 * h, 2 * w))
