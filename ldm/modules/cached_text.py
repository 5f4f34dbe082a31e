"""Keys and values of a text, computed once instead of at every step of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ldm.modules.attention import BasicTransformerBlock


class Once:
    """A function of one tensor that is not computed again as long as it is given the same tensor."""

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
    """Within this context the cross-attention of `unet` keeps the keys and values of the text that it saw last.

    For sampling: weights must not change meanwhile, nor the text in place. What an adapter makes of the text in each
    block (route attn2c-attn2c) is another tensor at each step, and so computed anew. A compiled UNet is left as it is:
    its graph knows values, not which tensor they came in.
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
