"""LDM's PLMS sampler class."""

from __future__ import annotations

from ldm.models.diffusion.latent_sampler import DDIMSchedule


class PLMSSampler(DDIMSchedule):
    """LDM's PLMS sampler: deterministic, S + 1 calls of the model."""

    name = "plms"
