"""LDM's DPM-Solver sampler class."""

from __future__ import annotations

from ldm.models.diffusion.latent_sampler import LatentSampler


class DPMSolverSampler(LatentSampler):
    """LDM's DPM-Solver sampler: deterministic, S calls of the model; good pictures from about 15 steps on."""

    name = "dpm_solver"
