"""A DreamBooth set with encoded pictures: the same draws, with posteriors instead of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.dreambooth import PersonalizedBase


class EncodedSamples(Dataset):
    """Sample k of `dataset`, but "image" has the posterior's parameters [h, w, 2c] of the picture, flipped or not.

    `moments` [pictures][2, 2c, h, w]: the second index is 1 for flipped pictures.
    """

    def __init__(self, dataset: PersonalizedBase, moments: Sequence[Tensor] | Tensor) -> None:
        self.dataset, self.moments = dataset, moments
        if hasattr(dataset, "group_by"):
            self.group_by = dataset.group_by

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return self.sample(k)

    def sample(self, k: int) -> dict[str, Any]:
        chosen = self.dataset.choose(k)
        image = self.moments[chosen.number][int(chosen.flipped)].permute(1, 2, 0)
        return {"image": image, **self.dataset.beside(chosen)}
