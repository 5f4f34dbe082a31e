"""Stand-ins for frozen encoders whose answers are known already: they give the same numbers and do no work.

The encoders themselves are kept out of the module tree: they do not follow the model to its device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution


class CachedPosteriors(nn.Module):
    """A first stage whose "pictures" [b, 2c, h, w] are the parameters of its posterior; it draws anew at every call."""

    def __init__(self, first_stage: nn.Module) -> None:
        super().__init__()
        self._encoder = [first_stage]
        self.downsampling_factor = first_stage.downsampling_factor

    def encode(self, moments: Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Latents to pictures, by the first stage itself, which comes to the device for it."""
        [first_stage] = self._encoder
        pictures = first_stage.to(z.device).decode(z)
        first_stage.cpu()
        return pictures


class CachedPrompts(nn.Module):
    """A text encoder that looks known prompts up, and asks the encoder itself for others."""

    def __init__(self, encoder: nn.Module, known: dict[str, Tensor]) -> None:
        super().__init__()
        self._encoder, self.known = [encoder], known

    def forward(self, prompts: str | Sequence[str]) -> Tensor:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return torch.stack([self._lookup(prompt) for prompt in prompts])

    def _lookup(self, prompt: str) -> Tensor:
        if prompt not in self.known:
            device = next(iter(self.known.values())).device
            self.known[prompt] = self._encoder[0].encode([prompt])[0].to(device)
        return self.known[prompt]

    def _apply(self, fn, recurse: bool = True):
        """Known encodings follow the model from device to device."""
        self.known = {prompt: fn(encoding) for prompt, encoding in self.known.items()}
        return super()._apply(fn, recurse)
