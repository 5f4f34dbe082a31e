"""The pictures of one folder in buckets of their shapes, with captions and masks of their own."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.data.augment import Colours
from ldm.data.buckets import Buckets, GroupedOrder, Shape, told
from ldm.data.captions import kohya_name
from ldm.data.dreambooth import CACHE_BYTES, Choice, Item, PersonalizedBase, as_item
from ldm.data.loss_masks import FOLDERS, LossMasks
from ldm.data.pictures import LABEL, Region, picture_size, read_picture, region, resized
from ldm.errors import InputError, short

log = logging.getLogger(__name__)

CROPS = ("center", "random", "none")
Place = tuple[float, float, float]  # how far down and to the right a part lies, and how far it is enlarged
MIDDLE = (0.5, 0.5, 1.0)


class ShapedPictures(PersonalizedBase):
    """The pictures of one folder, each with its own captions. Sample k depends only on (`seed`, k).

    Items are those of `PersonalizedBase`, whose other arguments it takes too; with buckets, `image` is [h, w, 3].

    captions: see `ldm.data.captions`; repeats: how often an epoch shows each picture (default: the number in a folder's
    name such as `10_sks dog`, else 1); templates: for pictures without a caption, with `{}` for the identifier and the
    class word. buckets: keep the pictures' shapes, see `Buckets`; by default all become squares. crop: the part of a
    picture that has the right shape: `center`, `random` at every draw (then pictures are encoded in every step, too),
    or `none`, the whole picture, squeezed. augment: random changes of training pictures, see `ldm.schema.Augment`, with
    which they are encoded in every step. masks: weigh the loss, see `LossMasks`; items then have `loss_mask` [h, w].
    Raises `InputError`, also for a picture without a caption if there are no
    templates.
    """

    has_subject = False

    def __init__(
        self,
        data_root: str | Path,
        size: int = 512,
        captions: str | Mapping | None = "auto",
        repeats: int | None = None,
        templates: str | Sequence[str] | None = None,
        buckets: bool | Mapping | None = None,
        crop: Literal["center", "random", "none"] = "center",
        masks: str | Mapping | None = None,
        augment: Mapping | None = None,
        **more: Any,
    ) -> None:
        if repeats is None:
            repeats, _ = kohya_name(Path(data_root)) or (1, "")
        captions = "auto" if captions is None else captions
        if masks is not None:
            self.read_elsewhere = (LABEL, *FOLDERS)
        super().__init__(data_root, size, captions=captions, repeats=repeats, templates=templates, **more)
        if crop not in CROPS:
            raise InputError(f"crop: expected one of {', '.join(CROPS)}, got {short(crop)}")
        self.crop = "none" if crop == "center" and not self.center_crop else crop
        self.shapes = self._shapes(Path(data_root), Buckets(size, buckets)) if buckets else None
        self.masks = LossMasks(Path(data_root), self.paths, masks) if masks is not None else None
        self._weights: dict[int, Tensor] = {}
        self.repeats = [repeats] * len(self.paths)
        self.group_by(1)
        self._change_at_random(Colours(augment or {}))

    def _change_at_random(self, change: Colours) -> None:
        """Take up the random changes of a set that is shuffled; others show their pictures unchanged."""
        self.colours = change if self.shuffle and change.changes else None
        self.zoom = change.chosen.zoom
        random_crop, zoomed = self.shuffle and self.crop == "random", self.shuffle and self.zoom > 1
        self.moves = random_crop or zoomed
        reasons = {"crop: random": random_crop, "zoom": zoomed, "augment": self.colours is not None}
        if any(reasons.values()):
            told = " and ".join(name for name, holds in reasons.items() if holds)
            self.why_not_cached = f"{told}, at each draw anew"

    def _shapes(self, folder: Path, buckets: Buckets) -> list[Shape]:
        shapes = [buckets.shape_of(*picture_size(path), str(path)) for path in self.paths]
        _tell(folder, told(shapes))
        return shapes

    def group_by(self, group: int) -> None:
        """From now on, each `group` of draws in a row, counted from 0, has pictures of one shape."""
        shapes = [self.shape_of(number) for number in range(len(self.paths))]
        self._grouped = GroupedOrder(shapes, self.repeats, group if len(set(shapes)) > 1 else 1)
        self._length, self._order = self._grouped.length, None

    @property
    def crops(self) -> str:
        return self.crop

    def shape_of(self, number: int) -> Shape:
        """(height, width) of picture `number` in items."""
        return self.shapes[number] if self.shapes else (self.size, self.size)

    def item(self, number: int, k: int) -> Item:
        chosen, place = self.choice(number, k), self._place(k)
        pixels = self._read(chosen.number) if place is None else self._fitted(chosen.number, place)
        if self.colours is not None:
            pixels = self.colours(pixels, self._generator("colours", k))
        return {"image": as_item(pixels, chosen.flipped), **self.beside(chosen, place)}

    def beside(self, chosen: Choice, place: Place | None = None) -> Item:
        item = {"caption": chosen.caption, **self.sizes_of(chosen.number, place)}
        if self.masks is not None:
            weights = self._loss_mask(chosen.number, place)
            item["loss_mask"] = weights.flip(1) if chosen.flipped else weights
        return item

    def _loss_mask(self, number: int, place: Place | None) -> Tensor:
        """Weights [h, w] of the loss, from memory if they were read before."""
        if place is None and number in self._weights:
            return self._weights[number]
        weights = self.masks.weights(number, self._region(number, place), self.shape_of(number))
        if place is None and (len(self._weights) + 1) * weights.nbytes <= CACHE_BYTES:
            self._weights[number] = weights
        return weights

    def _place(self, k: int) -> Place | None:
        """Where the part of sample k lies and how far it is enlarged; None if this does not change."""
        if not self.moves:
            return None
        down, right, zoom = torch.rand(3, generator=self._generator("crop", k)).tolist()
        return (down, right, 1 + (self.zoom - 1) * zoom)

    def _region(self, number: int, place: Place | None) -> Region | None:
        """The part of picture `number` that is shown; None for all of it."""
        if self.crop == "none" and place is None:
            return None
        down, right, zoom = place or MIDDLE
        size, shape = picture_size(self.paths[number]), self.shape_of(number)
        return region(*size, size if self.crop == "none" else shape, (down, right), zoom)

    def _fitted(self, number: int, place: Place | None = None) -> Tensor:
        """uint8 [3, h, w]."""
        return resized(
            read_picture(self.paths[number]), self.shape_of(number), self.interpolation, self._region(number, place)
        )

    def sizes_of(self, number: int, place: Place | None = None) -> dict[str, Tensor]:
        if not self.sizes:
            return {}
        shape, part = self.shape_of(number), self._region(number, place)
        corner = [0, 0] if part is None else [part[i] * shape[i] // part[2 + i] for i in (0, 1)]
        return self._sizes(picture_size(self.paths[number]), corner, shape)

    def epoch_order(self, generator: torch.Generator | None) -> Tensor:
        return self._grouped.order(generator)


@cache
def _tell(folder: Path, listed: str) -> None:
    """Once for each folder, even if several datasets read it."""
    log.info("%s: buckets %s", folder, listed)
