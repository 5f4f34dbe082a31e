"""The safety checker for pictures of Stable Diffusion's programs.

It has a CLIP picture tower and a head of concepts. A picture is flagged if its cosine to one of 17 concepts exceeds the
concept's threshold; thresholds are 0.01 lower for pictures that are near one of 3 special-care concepts. The concepts
are not published, only their embeddings, which are part of the checker's weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoints import read_weights
from ldm.errors import InputError
from ldm.evaluate.networks import WEIGHTS, Preprocessing, folder_of, read_preprocessing
from ldm.generate import to_pil
from ldm.modules.encoders.claims import building, read_clip

log = logging.getLogger(__name__)

PUBLISHED = "CompVis/stable-diffusion-safety-checker"
PLACES = ("models/safety-checker", PUBLISHED)  # a folder, and a name in the hub's cache
LOWERED = 0.01


class SafetyHead(nn.Module):
    """Flags for picture embeddings, with the parameter names of the published weights."""

    def __init__(self, width: int, embed_dim: int, concepts: int = 17, special: int = 3) -> None:
        super().__init__()
        self.visual_projection = nn.Linear(width, embed_dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.zeros(concepts, embed_dim))
        self.special_care_embeds = nn.Parameter(torch.zeros(special, embed_dim))
        self.concept_embeds_weights = nn.Parameter(torch.zeros(concepts))  # thresholds of the cosine
        self.special_care_embeds_weights = nn.Parameter(torch.zeros(special))

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled states [b, width] of the picture tower to flags [b]."""
        embeds = F.normalize(self.visual_projection(pooled))
        special = embeds @ F.normalize(self.special_care_embeds).T - self.special_care_embeds_weights
        near = embeds @ F.normalize(self.concept_embeds).T - self.concept_embeds_weights
        lowered = LOWERED * (special > 0).any(1, keepdim=True)
        return (near + lowered > 0).any(1)


class SafetyChecker(nn.Module):
    """The tower, the head, and the preprocessing."""

    def __init__(self, tower: nn.Module, head: SafetyHead, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.tower, self.head, self.preprocessing = tower, head, preprocessing

    @torch.no_grad()
    def flagged(self, pictures: Sequence[Tensor]) -> list[bool]:
        """Which of some pictures [3, H, W] in [0, 1] are flagged."""
        shown = torch.stack([self.preprocessing(to_pil(picture)) for picture in pictures])
        device = self.head.concept_embeds.device
        return self.head(self.tower(pixel_values=shown.to(device)).pooler_output).tolist()

    def checked(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """The pictures, with flagged ones replaced by black, which is logged."""
        flags = self.flagged(pictures)
        if any(flags):
            log.warning("the safety checker blanked %d of %d pictures", sum(flags), len(flags))
        return [torch.zeros_like(one) if flag else one for one, flag in zip(pictures, flags, strict=True)]


def find_checker(wanted: str | None) -> SafetyChecker | None:
    """The checker of a folder or hub name; by default the published one, or None if it is not on this machine.

    `off` gives None. Nothing is downloaded. Raises `InputError` for a given folder that cannot be used.
    """
    if wanted == "off":
        return None
    for place in [wanted] if wanted else PLACES:
        if folder := folder_of(place):
            return load_checker(folder)
    if wanted:
        raise InputError(f"no safety checker in {wanted}: expected a folder with config.json and weights, or off")
    log.info("pictures are not checked: no safety checker is in %s or the hub's cache (%s)", *PLACES)
    return None


def load_checker(folder: Path) -> SafetyChecker:
    """The checker of a folder in Hugging Face's format. Raises `InputError`."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = read_clip(folder)
    tower_config = config.get("vision_config") or {}
    with building(folder):
        tower = CLIPVisionModel(CLIPVisionConfig(**tower_config))
    head = SafetyHead(tower.config.hidden_size, int(config.get("projection_dim", 768)))
    file = next((path for name in WEIGHTS if (path := folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin")
    weights = {name: value for name, value in read_weights(file).items() if not name.endswith("position_ids")}
    own = {name: value for name, value in weights.items() if not name.startswith("vision_model.")}
    seen = {name.removeprefix("vision_model."): v for name, v in weights.items() if name.startswith("vision_model.")}
    # Released files have vision_model.vision_model.*; in transformers 5 the prefix is vision_model.* or empty.
    seen = {name.removeprefix("vision_model."): value for name, value in seen.items()}
    inner = getattr(tower, "vision_model", tower)
    for part, found, name in ((inner, seen, "picture tower"), (head, own, "head")):
        try:
            part.load_state_dict(found)
        except RuntimeError as error:
            raise InputError(f"{file} does not fit the {name} of a safety checker: {str(error)[:200]}") from None
    return SafetyChecker(tower, head, read_preprocessing(folder)).eval().requires_grad_(False)
