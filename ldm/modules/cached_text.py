"""Computes the keys and values of a text once instead of at every step of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ldm.modules.attention import BasicTransformerBlock


class Once:
    """A function of one tensor that keeps its last result and returns it again for the same tensor."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        self.function = function
        self.seen: Tensor | None = None
        self.result: Any = None

    def __call__(self, x: Tensor) -> Any:
        if x is not self.seen:
            self.seen, self.result = x, self.function(x)
        return self.result


@contextmanager
def cached_text(unet: nn.Module) -> Iterator[None]:
    """Within this context, the cross-attention of `unet` caches the keys and values of the last text.

    Use it for sampling: the weights must not change, and the text must not change in place. An adapter on the text
    (route attn2c-attn2c) makes a new tensor at each step, so its keys and values are computed again. A compiled UNet is
    left as it is, because its graph cannot compare the identity of tensors.
    """
    compiled = getattr(unet, "_compiled_call_impl", None) is not None
    layers = [] if compiled else [m.attn2 for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    for layer in layers:
        layer.keys_and_values = Once(layer.keys_and_values)
    try:
        yield
    finally:
        for layer in layers:
            del layer.keys_and_values
