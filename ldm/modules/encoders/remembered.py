"""A frozen text encoder that caches the encoding of every prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.modules.encoders.modules import FrozenCLIPEmbedder


class RememberingCLIPEmbedder(FrozenCLIPEmbedder):
    """A `FrozenCLIPEmbedder` for training on recurring captions: it keeps their encodings in half precision.

    A prompt of 32 tokens of width 128 takes 8 kB.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remembered: dict[str, Tensor] = {}

    @torch.no_grad()
    def forward(self, text: str | Sequence[str]) -> Tensor:
        texts = [text] if isinstance(text, str) else list(text)
        if new := sorted(set(texts) - self.remembered.keys()):
            self.remembered.update(zip(new, super().forward(new).half(), strict=True))
        return torch.stack([self.remembered[t].float() for t in texts])
