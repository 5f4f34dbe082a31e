"""Guidance for sgm's samplers: it works on estimates of x_0, and one half of the batch is unconditional."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError

JOINED = ("vector", "crossattn", "concat")  # entries of a condition that differ between the two halves


class IdentityGuider:
    """No guidance: only the condition."""

    def __call__(self, x: Tensor, sigma: Any) -> Tensor:
        return x

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Mapping, uc: Mapping | None) -> tuple[Tensor, Tensor, dict]:
        """The denoiser's input: x, sigma, condition."""
        return x, s, dict(c)


class VanillaCFG:
    """Classifier-free guidance (arXiv 2207.12598): u + scale (c - u), for the batch [uncond, cond].

    `dyn_thresh_config` comes from earlier versions; only the one without thresholding is supported.
    Raises `InputError` for others.
    """

    def __init__(self, scale: float, dyn_thresh_config: Mapping | None = None) -> None:
        if dyn_thresh_config is not None and not str(dyn_thresh_config.get("target")).endswith(
            ".NoDynamicThresholding"
        ):
            raise InputError(f"VanillaCFG: unknown dyn_thresh_config {dyn_thresh_config.get('target')!r}; leave it out")
        self.scale = scale

    def __call__(self, x: Tensor, sigma: Any) -> Tensor:
        uncond, cond = x.chunk(2)
        return uncond + self.scale * (cond - uncond)

    def prepare_inputs(self, x: Tensor, s: Tensor, c: Mapping, uc: Mapping) -> tuple[Tensor, Tensor, dict]:
        """The denoiser's input: x, sigma and condition, twice. Raises `InputError` if the conditions do not fit."""
        if uc is None or c.keys() != uc.keys():
            raise InputError(
                f"guidance needs the same entries on both sides: the condition has {sorted(c)}, the unconditional one "
                f"{sorted(uc or ())}"
            )
        joined = {key: torch.cat([uc[key], value]) if key in JOINED else value for key, value in c.items()}
        return torch.cat([x, x]), torch.cat([s, s]), joined
