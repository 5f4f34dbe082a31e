"""Pictures of several concepts as one set, as diffusers' training of Custom Diffusion shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset

from ldm.data.custom import MaskBase
from ldm.errors import InputError


class ConceptPictures(Dataset):
    """The pictures of several concepts, or of their classes, in one order: an epoch shows each of them once.

    Items are those of `MaskBase`. Sample k depends only on (`seed`, k).

    concepts: for each one the arguments of `MaskBase` that are its own, at least `datapath` and `caption`
    the others: those of `MaskBase`, for all of them

    Raises `InputError` as `MaskBase` does.
    """

    def __init__(
        self,
        concepts: Sequence[Mapping[str, Any]],
        size: int = 512,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
        aug: bool = True,
        style: bool = False,
        templates: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        common = {"size": size, "interpolation": interpolation, "flip_p": flip_p, "aug": aug, "style": style}
        if not concepts:
            raise InputError("data.params.train.params.concepts is empty; expected a datapath and a caption at least")
        self.seed = seed
        self.sets = [MaskBase(**one, **common, templates=templates, seed=seed + i) for i, one in enumerate(concepts)]
        self.ends = list(accumulate(map(len, self.sets)))
        self._order: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        """Pictures of all concepts."""
        return self.ends[-1]

    def __getitem__(self, k: int) -> dict[str, Any]:
        return self.sample(k)

    def sample(self, k: int) -> dict[str, Any]:
        """Item number k of the run, k >= 0."""
        epoch, place = divmod(k, len(self))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed << 24) + epoch)
            self._order = epoch, torch.randperm(len(self), generator=generator)
        number = int(self._order[1][place])
        which = next(i for i, end in enumerate(self.ends) if number < end)
        concept = self.sets[which]
        return concept.sample(epoch * len(concept) + number - (self.ends[which] - len(concept)))

    def examples(self) -> list[str]:
        """A caption of each concept, for sample pictures."""
        return [concept.examples()[0] for concept in self.sets]
