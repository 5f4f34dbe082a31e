"""Masks of pictures that weigh the training loss: white counts fully, black as much as `rest` says.

Not to be confused with the masks of inpainting (`ldm.data.masked`), which the model sees.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ldm import schema
from ldm.data.pictures import LABEL, Region, read_alpha, read_picture, resized, some
from ldm.errors import InputError

log = logging.getLogger(__name__)

FOLDERS = ("mask", "masks")
ENDINGS = (".png", ".webp", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class LossMasks:
    """The masks of the pictures of one folder. A picture without one counts everywhere.

    settings: a source, or a mapping of `ldm.schema.Masks`. Raises `InputError` if the source has no mask at all.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], settings: str | Mapping[str, Any]) -> None:
        given = {"source": settings} if isinstance(settings, str) else dict(settings)
        schema.check_part(schema.Masks, given, "masks")
        chosen = schema.Masks(**given)
        self.rest = chosen.rest
        self.files: list[Path | None] = [None] * len(paths)  # None: the picture's own alpha channel
        self.paths, self.has_alpha = paths, chosen.source in ("auto", "alpha")
        if chosen.source != "alpha":
            sources = {"label": (_label,), "folder": (_in_folder,), "auto": (_label, _in_folder)}[chosen.source]
            names = {path.name for path in folder.iterdir()}
            within = {name: {path.name for path in (folder / name).iterdir()} for name in FOLDERS if name in names}
            self.files = [next(filter(None, (find(path, names, within) for find in sources)), None) for path in paths]
        self._check(folder, chosen.source)

    def _check(self, folder: Path, source: str) -> None:
        without = [
            path.name for path, file in zip(self.paths, self.files, strict=True)
            if file is None and not (self.has_alpha and read_alpha(path, only_ask=True))
        ]  # fmt: skip
        if len(without) == len(self.paths):
            expected = {
                "alpha": "an alpha channel", "label": f"{self.paths[0].stem}{LABEL}.png",
                "folder": f"mask/{self.paths[0].stem}.png",
            }  # fmt: skip
            wanted = expected.get(source) or " or ".join(expected.values())
            raise InputError(f"masks: {source} finds none in {folder}: expected {wanted} of {self.paths[0].name}")
        _tell(folder, len(self.paths), tuple(without))

    def weights(self, number: int, part: Region | None, shape: tuple[int, int]) -> Tensor:
        """The weights [h, w] in [`rest`, 1] of a part of picture `number`, resized to `shape`.

        Raises `InputError` for a mask of another aspect ratio than its picture, and for one without white.
        """
        mask = self._read(number)
        if mask is None:
            return torch.ones(shape)
        values = resized(mask, shape, "bilinear", part)[0].float() / 255
        return self.rest + (1 - self.rest) * values

    def _read(self, number: int) -> Image.Image | None:
        """A mask in the size of its picture; None for a picture without one."""
        file, path = self.files[number], self.paths[number]
        if file is None:
            mask = read_alpha(path) if self.has_alpha else None
        else:
            mask, size = read_picture(file).convert("L"), read_picture(path).size
            if abs(mask.width * size[1] - mask.height * size[0]) > max(*size, *mask.size):
                raise InputError(
                    f"the mask {file} has {mask.width} x {mask.height} pixels, its picture {size[0]} x {size[1]}: "
                    "expected the same shape"
                )
            mask = mask if mask.size == size else mask.resize(size, Image.Resampling.NEAREST)
        if mask is not None and mask.getextrema()[1] == 0:
            raise InputError(f"the mask {file or path} is black: nothing of its picture counts; remove one of them")
        return mask.convert("RGB") if mask is not None else None


def _label(path: Path, names: set[str], _: Mapping[str, set[str]]) -> Path | None:
    """OneTrainer's masks: dog-masklabel.png beside dog.jpg."""
    return next((path.with_name(f"{path.stem}{LABEL}{e}") for e in ENDINGS if f"{path.stem}{LABEL}{e}" in names), None)


def _in_folder(path: Path, _: set[str], within: Mapping[str, set[str]]) -> Path | None:
    """mask/dog.png, or the name of the picture itself."""
    likely = [path.name, *(f"{path.stem}{ending}" for ending in ENDINGS)]
    return next((path.parent / name / file for name, own in within.items() for file in likely if file in own), None)


@cache
def _tell(folder: Path, count: int, without: tuple[str, ...]) -> None:
    """Once for each folder, even if several datasets read it."""
    log.info("%s: %d pictures, %d masks", folder, count, count - len(without))
    if without:
        log.warning("%s: %d pictures without a mask count everywhere: %s", folder, len(without), some(without))
