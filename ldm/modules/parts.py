"""Common to transformer blocks and residual blocks: zero initialisation and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from ldm.errors import InputError


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters to zero: a new branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


# The results that selective checkpointing keeps, because they are expensive to compute again.
ATTENTIONS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
COSTLY = [torch.ops.aten.convolution.default, torch.ops.aten.mm.default, torch.ops.aten.addmm.default] + [
    getattr(torch.ops.aten, f"_scaled_dot_product_{kind}").default
    for kind in ATTENTIONS
    if hasattr(torch.ops.aten, f"_scaled_dot_product_{kind}")
]
CHECKPOINTS = {
    True: {},
    "selective": {"context_fn": partial(create_selective_checkpoint_contexts, COSTLY)},
}


def checkpoint(function: Callable, inputs: tuple, kind: bool | str):
    """`function(*inputs)`; with `kind` True its activations are recomputed in the backward pass instead of stored.

    "selective" stores the results of matrix products, convolutions and attention, and recomputes the rest. This is the
    non-reentrant variant: parameters need not be listed, frozen ones get no gradient, `torch.compile` supports it.
    Raises `InputError` for another kind.
    """
    if kind not in (False, *CHECKPOINTS):
        raise InputError(f"use_checkpoint must be true, false or selective, got {kind!r}")
    if kind and torch.is_grad_enabled():
        return torch_checkpoint(function, *inputs, use_reentrant=False, **CHECKPOINTS[kind])
    return function(*inputs)
