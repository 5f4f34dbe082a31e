"""Folders of captioned pictures of any shapes, as kohya, OneTrainer and diffusers train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ldm import schema
from ldm.config import parameters_of
from ldm.data.buckets import GroupedOrder, Shape
from ldm.data.captions import kohya_name
from ldm.data.dreambooth import Choice, Item
from ldm.data.pictures import is_picture
from ldm.data.shaped import Place, ShapedPictures
from ldm.errors import InputError, did_you_mean, short

COMMON = ("set", "seed", "reg", "sizes", "interpolation", "size")  # arguments that all folders share
SHARED = ("size", "interpolation", "sizes", "seed", "shuffle", "reg", "identifier", "class_word")  # of the first folder


class CaptionedFolder(ShapedPictures):
    """The pictures of one folder, or of several, each with settings of its own.

    Sample k depends only on (`seed`, k). Items and all other arguments are those of `ShapedPictures`.

    data_root: a folder of pictures, or a folder without pictures that has folders such as `10_sks dog`. concepts: in
    place of it, mappings of `path` and any arguments of `ShapedPictures` but `COMMON`; what a mapping lacks is taken
    from the other arguments. Raises `InputError`.
    """

    def __init__(
        self, data_root: str | Path | None = None, concepts: Sequence[Mapping[str, Any]] | None = None, **more: Any
    ) -> None:
        folders = [read_concept(one, number) for number, one in enumerate(concepts or ())] or folders_in(data_root)
        self.parts = [ShapedPictures(**{**more, **folder}) for folder in folders]
        for name in SHARED:
            setattr(self, name, getattr(self.parts[0], name))
        self.paths = self._all("paths")
        self.shapes = self._all("shapes") or None
        self.repeats = self._all("repeats")
        self.why_not_cached = next(filter(None, (part.why_not_cached for part in self.parts)), None)
        captions = [part.captions for part in self.parts]
        self.captions = SimpleNamespace(
            texts=[texts for one in captions for texts in one.texts], vary=any(one.vary for one in captions)
        )
        self.has_masks = any(part.masks is not None for part in self.parts)
        self._starts = torch.tensor([len(part.paths) for part in self.parts]).cumsum(0)
        self.group_by(1)

    def _all(self, name: str) -> list[Any]:
        """The lists of that name of all folders, in one."""
        return [one for part in self.parts for one in getattr(part, name) or ()]

    def group_by(self, group: int) -> None:
        shapes = [part.shape_of(number) for part in self.parts for number in range(len(part.paths))]
        self._grouped = GroupedOrder(shapes, self.repeats, group if len(set(shapes)) > 1 else 1)
        self._length, self._order = self._grouped.length, None

    def _part(self, number: int) -> tuple[ShapedPictures, int, int]:
        """The folder of picture `number`, its number there, and the number of the folder's first picture."""
        place = int(torch.searchsorted(self._starts, number, right=True))
        start = int(self._starts[place - 1]) if place else 0
        return self.parts[place], number - start, start

    @property
    def crops(self) -> str:
        return ", ".join(f"{part.crops} {len(part.paths)}" for part in self.parts)

    def shape_of(self, number: int) -> Shape:
        part, own, _ = self._part(number)
        return part.shape_of(own)

    def picture(self, number: int, flipped: bool) -> Tensor:
        part, own, _ = self._part(number)
        return part.picture(own, flipped)

    def choice(self, number: int, k: int) -> Choice:
        part, own, start = self._part(number)
        chosen = part.choice(own, k)
        return chosen._replace(number=chosen.number + start)

    def item(self, number: int, k: int) -> Item:
        part, own, _ = self._part(number)
        return self._with_mask(part.item(own, k), part.shape_of(own))

    def beside(self, chosen: Choice, place: Place | None = None) -> Item:
        part, own, _ = self._part(chosen.number)
        return self._with_mask(part.beside(chosen._replace(number=own), place), part.shape_of(own))

    def _with_mask(self, item: Item, shape: Shape) -> Item:
        """Where some folders have masks, the items of all have one, so that they make batches."""
        return item | ({"loss_mask": torch.ones(shape)} if self.has_masks and "loss_mask" not in item else {})

    def sizes_of(self, number: int, place: Place | None = None) -> dict[str, Tensor]:
        part, own, _ = self._part(number)
        return part.sizes_of(own, place)

    def all_captions(self) -> list[str]:
        return sorted({caption for part in self.parts for caption in part.all_captions()})


def read_concept(concept: Any, number: int) -> dict[str, Any]:
    """An entry of `concepts` as arguments of `ShapedPictures`. Raises `InputError` for unknown and missing keys."""
    if not isinstance(concept, Mapping) or not isinstance(concept.get("path"), (str, Path)):
        raise InputError(f"concepts.{number}: expected path, the path of a folder with pictures, got {short(concept)}")
    known = {"path", *parameters_of(ShapedPictures)[1]} - {"data_root", *COMMON}
    for key in concept:
        if key in COMMON:
            raise InputError(f"concepts.{number}.{key}: all folders have the same {key}; set it beside concepts")
        if key not in known:
            raise InputError(f"concepts.{number}.{key} is unknown{did_you_mean(str(key), sorted(known))}")
        if key in schema.OF_DATASETS:
            schema.check_part(schema.OF_DATASETS[key], concept[key], f"concepts.{number}.{key}")
    return {"data_root" if key == "path" else key: value for key, value in concept.items()}


def folders_in(root: str | Path | None) -> list[dict[str, Any]]:
    """The folder itself, or, if it has no pictures, its folders whose names are such as `10_sks dog` (kohya's layout).

    Raises `InputError` without a folder.
    """
    if root is None:
        raise InputError("no pictures: data_root names a folder of them, concepts several")
    path = Path(root)
    within = sorted(path.iterdir()) if path.is_dir() else []
    named = [one for one in within if one.is_dir() and kohya_name(one)]
    if not named or any(map(is_picture, within)):
        return [{"data_root": root}]
    return [{"data_root": one} for one in named]
