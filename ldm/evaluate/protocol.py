"""The protocol of an evaluation: DreamBooth's, and quicker ones. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Protocol:
    """What to draw and how to compare it; the default is DreamBooth's protocol.

    prompts: `auto` (the class decides), `object`, `live`, `mini`, a file of templates, or templates
    first: use only so many of them; None: all
    per_prompt: pictures of each prompt
    class_templates, per_class: the prompts for prior drift and the pictures of each; 0: no prior drift
    seed: of the first picture; it increases by 1 for each picture
    networks: names, see `ldm.evaluate.networks`; None: the default of the base
    """

    prompts: str | tuple[str, ...] = "auto"
    first: int | None = None
    per_prompt: int = 4
    identifier: str = "sks"
    class_templates: tuple[str, ...] = ("photo of a {}",)
    per_class: int = 16
    seed: int = 0
    sampler: str = "ddim"
    steps: int = 50
    scale: float = 7.5
    batch_size: int = 16
    networks: tuple[str, ...] | None = None
    level: float = 0.95
    draws: int = 2000  # resamples of the bootstrap
    download: bool = False  # networks that are not in the hub's cache


# Four prompts with four pictures each by DPM-Solver: a few seconds for SD-mini on two cores.
FAST = Protocol(first=4, per_class=4, sampler="dpm_solver", steps=10)
PROTOCOLS = {"dreambooth": Protocol(), "fast": FAST, "mini": replace(FAST, prompts="mini", scale=5.0)}
