"""Draws of captioned pictures, encoded once and kept on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.captioned import CaptionedPictures


@dataclass(frozen=True)
class EncodedDraws:
    """Posteriors of n pictures and the encodings of their captions, in half precision on one device.

    means, deviations: [n, c, h, w] of the autoencoder's Gaussians, already multiplied by the model's `scale_factor`;
    caption: int64 [n], rows of `contexts` [m, tokens, width], whose row 0 is the empty caption.
    """

    means: Tensor
    deviations: Tensor
    caption: Tensor
    contexts: Tensor

    def __len__(self) -> int:
        return len(self.means)

    def batch(self, size: int, ucg_rate: float) -> tuple[Tensor, Tensor]:
        """Latents float32 [size, c, h, w], drawn with replacement, and the encodings of their captions.

        With probability `ucg_rate` that of the empty caption (arXiv 2207.12598, Alg. 1). Nothing waits for the device.
        """
        device = self.means.device
        rows = torch.randint(len(self), (size,), device=device)
        mean, deviation = self.means[rows].float(), self.deviations[rows].float()
        caption = torch.where(torch.rand(size, device=device) < ucg_rate, 0, self.caption[rows])
        return mean + deviation * torch.randn_like(mean), self.contexts[caption].float()


@torch.no_grad()
def encode_draws(
    pictures: CaptionedPictures, model: nn.Module, first: int, count: int, batch_size: int = 1000
) -> EncodedDraws:
    """Draws `first` .. `first + count` of `pictures`, encoded by the model's first stage and text encoder."""
    means, deviations, rows = [], [], []
    captions: dict[str, int] = {"": 0}
    for start in range(first, first + count, batch_size):
        batch = pictures.batch(range(start, min(start + batch_size, first + count)))
        posterior = encode_pictures(model.first_stage_model, batch["image"])
        means.append((posterior.mean * model.scale_factor).half())
        deviations.append((posterior.std * model.scale_factor).half())
        rows += [captions.setdefault(caption, len(captions)) for caption in batch["caption"]]
    texts = list(captions)
    parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    contexts = torch.cat([model.cond_stage_model(part).half() for part in parts])
    device = contexts.device
    return EncodedDraws(torch.cat(means), torch.cat(deviations), torch.tensor(rows, device=device), contexts)


def encode_pictures(first_stage: nn.Module, images: Tensor) -> Any:
    """The Gaussians in which the first stage encodes pictures [b, h, w, 3] in -1 .. 1."""
    return first_stage.encode(images.movedim(-1, 1).contiguous(memory_format=torch.channels_last))
