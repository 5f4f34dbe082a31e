"""LDM's data sets of ImageNet (arXiv 1409.0575), from a folder with a sub-folder for each class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.data.listed import ListedPictures, without
from ldm.data.pictures import INTERPOLATIONS, normalize, read_picture, resized
from ldm.errors import InputError, short

PIL, CV = "pil_", "cv_"


class ImageNetBase(ListedPictures):
    """Items of `ListedPictures` with `class_label`, `synset` (the name of the folder) and `human_label`.

    Labels count the folders in the order of their names, from 0, as published: the 1000 WordNet ids give the usual
    labels. `human_label` is the name of the folder; published files with words for them are not read.

    config: the published mapping `{size, random_crop}`; data_root: the folder of the class folders

    Raises `InputError`.
    """

    root, crops_at_random = "", False

    def __init__(
        self, config: Mapping[str, Any] | None = None, data_root: str | None = None, size: int | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        config = dict(config or {})
        without(config, ("size", "random_crop"), f"{type(self).__name__}: config")
        root = class_folders(Path(data_root or self.root))
        side = size or config.get("size") or 256
        super().__init__(root, size=side, random_crop=config.get("random_crop", self.crops_at_random), seed=seed)
        folders = [Path(name).parts[0] for name in self.names]
        self.classes = sorted(set(folders))
        if self.classes and any(len(Path(name).parts) < 2 for name in self.names):
            raise InputError(f"{root} has pictures beside the folders of its classes; move them into those")
        place = {name: number for number, name in enumerate(self.classes)}
        self.labels = [place[folder] for folder in folders]

    def item(self, number: int, draws: torch.Generator) -> dict[str, Any]:
        return super().item(number, draws) | self.labels_of(number)

    def labels_of(self, number: int) -> dict[str, Any]:
        name = self.classes[self.labels[number]]
        return {"class_label": self.labels[number], "synset": name, "human_label": name}


def class_folders(root: Path) -> Path:
    """The folder of the class folders: `root`, or `data` in it, where the published code unpacks them."""
    return root / "data" if (root / "data").is_dir() else root


class ImageNetTrain(ImageNetBase):
    root, crops_at_random = "data/ILSVRC2012_train", True


class ImageNetValidation(ImageNetBase):
    root = "data/ILSVRC2012_validation"


class ImageNetSR(ImageNetBase):
    """A random square of each picture as `image`, and the same made smaller as `LR_image`, for upscaling.

    degradation: `pil_nearest`, `pil_bilinear`, ... or `cv_...`: the filter; downscale_f: how much smaller; min_crop_f,
    max_crop_f: side of the square as a share of the smaller side; random_crop: at a random place, else in the middle
    """

    def __init__(
        self,
        size: int | None = None,
        degradation: str | None = None,
        downscale_f: int = 4,
        min_crop_f: float = 0.5,
        max_crop_f: float = 1.0,
        random_crop: bool = True,
        data_root: str | None = None,
        seed: int = 0,
    ) -> None:
        self.filter = (degradation or "pil_nearest").removeprefix(PIL).removeprefix(CV)
        if self.filter not in INTERPOLATIONS:
            known = ", ".join(f"{PIL}{name}" for name in INTERPOLATIONS)
            raise InputError(f"degradation {short(degradation)} is not supported; expected one of {known}")
        if not 0 < min_crop_f <= max_crop_f <= 1 or not isinstance(downscale_f, int) or downscale_f < 1:
            raise InputError(f"expected 0 < min_crop_f <= max_crop_f <= 1 and a whole downscale_f, got {min_crop_f}, "
                             f"{max_crop_f} and {downscale_f}")  # fmt: skip
        super().__init__({"random_crop": random_crop}, data_root, size or 256, seed)
        self.shares, self.small = (min_crop_f, max_crop_f), max(1, self.size // downscale_f)

    def item(self, number: int, draws: torch.Generator) -> dict[str, Any]:
        picture = read_picture(self.root / self.names[number])
        share, down, right = torch.rand(3, generator=draws).tolist()
        low, high = self.shares
        side = max(1, round(min(picture.size) * (low + (high - low) * share)))
        down, right = (down, right) if self.random_crop else (0.5, 0.5)
        part = int(down * (picture.height - side)), int(right * (picture.width - side)), side, side
        both = {"image": (self.size, "lanczos"), "LR_image": (self.small, self.filter)}
        pixels = {name: resized(picture, (n, n), how, part) for name, (n, how) in both.items()}
        images = {name: normalize(value).permute(1, 2, 0).contiguous() for name, value in pixels.items()}
        return images | {"relpath": self.names[number]} | self.labels_of(number)


class ImageNetSRTrain(ImageNetSR):
    root = "data/ILSVRC2012_train"


class ImageNetSRValidation(ImageNetSR):
    root = "data/ILSVRC2012_validation"
