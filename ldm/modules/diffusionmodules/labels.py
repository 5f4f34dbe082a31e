"""The argument y of a UNet: class labels, numbers, or a vector as in SDXL."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.modules.diffusionmodules.util import timestep_embedding


class Timestep(nn.Module):
    """Numbers [b] to sinusoidal embeddings [b, dim], see `timestep_embedding`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return timestep_embedding(t, self.dim).to(t.dtype if t.is_floating_point() else torch.float32)


def _two_layers(width: int, emb_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))


# Values of `num_classes` other than a number of classes: y [b, 1], numbers y [b], or vectors y [b, adm_in_channels].
LABELS = {
    "continuous": lambda adm, width, emb: nn.Linear(1, emb),
    "timestep": lambda adm, width, emb: nn.Sequential(Timestep(width), _two_layers(width, emb)),
    "sequential": lambda adm, width, emb: nn.Sequential(_two_layers(adm, emb)),
}


def label_embedding(num_classes: int | str, adm_in_channels: int | None, width: int, emb_channels: int) -> nn.Module:
    """The module that adds y to the time embedding. Raises `InputError` for an unknown kind and a missing width."""
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, emb_channels)
    if num_classes not in LABELS:
        raise InputError(f"UNetModel: num_classes must be a number or one of {', '.join(LABELS)}, got {num_classes!r}")
    if num_classes == "sequential" and adm_in_channels is None:
        raise InputError("UNetModel: num_classes: sequential needs adm_in_channels, the width of the vector y")
    return LABELS[num_classes](adm_in_channels, width, emb_channels)


def check_labels(y: Tensor | None, batch: int, num_classes: int | str | None, adm_in_channels: int | None) -> None:
    """Raises `InputError` if y does not fit a UNet with these parameters or the batch size."""
    if y is None and num_classes is not None:
        raise InputError("the vector or class labels y are missing: this UNet has num_classes and needs them")
    if y is None:
        return
    if num_classes is None:
        raise InputError("this UNet has no num_classes, so that it cannot take class labels or vectors y")
    if len(y) != batch:
        raise InputError(f"y is for {len(y)} samples, the batch has {batch}: they must agree")
    if num_classes == "sequential" and y.shape[1:] != (adm_in_channels,):
        raise InputError(
            f"y has shape {list(y.shape)}, this UNet takes vectors [{batch}, {adm_in_channels}]: set adm_in_channels "
            "of the UNet to the width of what the conditioner gives as vector"
        )
