"""Replacements for frozen encoders that return cached results.

The encoders themselves are not in the module tree, so they do not move to the device with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class CachedPosteriors(nn.Module):
    """A first stage whose "pictures" [b, 2c, h, w] are posterior parameters. Every call samples from the posterior."""

    def __init__(self, first_stage: nn.Module) -> None:
        super().__init__()
        self._encoder = [first_stage]
        self.downsampling_factor = first_stage.downsampling_factor

    @property
    def first_stage(self) -> nn.Module:
        """The first stage itself. It is no submodule, so that it stays on the host."""
        return self._encoder[0]

    def encode(self, moments: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Latents to pictures, by the first stage itself, which moves to the device first."""
        pictures = self.first_stage.to(z.device).decode(z)
        self.first_stage.cpu()
        return pictures


Encoding = Tensor | tuple[Tensor, ...]  # of a prompt, [tokens, d]; SDXL's second encoder also gives a pooled vector [d]


def each(function: Callable[[Tensor], Tensor], encoding: Encoding) -> Encoding:
    """Apply `function` to a tensor, or to each of several tensors."""
    return tuple(map(function, encoding)) if isinstance(encoding, tuple) else function(encoding)


class CachedPrompts(nn.Module):
    """A text encoder that looks up known prompts and calls the encoder itself for others."""

    def __init__(self, encoder: nn.Module, known: dict[str, Encoding]) -> None:
        super().__init__()
        self._encoder, self.known = [encoder], known

    def forward(self, prompts: str | Sequence[str]) -> Encoding:
        found = [self._lookup(prompt) for prompt in ([prompts] if isinstance(prompts, str) else prompts)]
        if isinstance(found[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return torch.stack(found)

    def _lookup(self, prompt: str) -> Encoding:
        if prompt not in self.known:
            [first, *_] = self.known.values()
            device = (first[0] if isinstance(first, tuple) else first).device
            self.known[prompt] = each(lambda part: part[0].to(device), self._encoder[0].encode([prompt]))
        return self.known[prompt]

    def _apply(self, fn, recurse: bool = True):
        """Move the known encodings with the model."""
        self.known = {prompt: each(fn, encoding) for prompt, encoding in self.known.items()}
        return super()._apply(fn, recurse)
