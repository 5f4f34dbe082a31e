"""Common to transformer blocks and residual blocks: zero initialisation and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from ldm.errors import InputError, short


def refuse_sizes(owner: str, **sizes: Any) -> None:
    """Raises `InputError` for sizes, or lists of sizes, that are not whole numbers of at least 1; None is no size."""
    for name, value in sizes.items():
        rows = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if value is not None and (not rows or not all(type(one) is int and one > 0 for one in rows)):
            raise InputError(f"{owner}: {name} must be of at least 1, got {short(value)}")


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
