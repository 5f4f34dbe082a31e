"""Sampling from a noised picture instead of pure noise: SDEdit (arXiv 2108.01073), LDM's img2img."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ldm.errors import InputError
from ldm.models.diffusion.samplers import Level, Step
from ldm.models.diffusion.sigma_steps import SigmaSteps, alpha_of


def last_steps(steps: Any, strength: float) -> tuple[Any, float]:
    """The last `int(strength * steps)` updates of a sampler, and alpha_bar of the level that they begin at.

    strength: from 0 (the picture stays) to 1 (pure noise). For the steps of DDIM and PLMS, the picture is noised to the
    level of the step before, as published: `stochastic_encode(z, t_enc)` uses step t_enc, counted from 0, and decoding
    begins at t_enc - 1. At strength 1 there is no such step, so the first step's own level is used.
    Raises `InputError` for a strength outside 0 .. 1 or so small that no update remains.
    """
    if not 0 <= strength <= 1:
        raise InputError(f"strength must be from 0 to 1, got {strength:g}")
    total = len(steps) - (1 if _is_levels(steps) else 0)
    count = int(strength * total)
    if count < 1:
        raise InputError(f"strength {strength:g} of {total} steps leaves none to make: raise --strength or the steps")
    if isinstance(steps, SigmaSteps):
        left = steps.sigmas[-count - 1 :]
        return replace(steps, sigmas=left), alpha_of(left[0]) ** 2
    if _is_levels(steps):
        return steps[-count - 1 :], steps[-count - 1].alpha ** 2
    before: Sequence[Step] = steps[-count - 1 : -count] or steps[-count:]
    return steps[-count:], before[0].alpha_bar


def _is_levels(steps: Any) -> bool:
    return not isinstance(steps, SigmaSteps) and isinstance(steps[0], Level)
