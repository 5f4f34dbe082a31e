"""Reads pictures and masks for img2img and inpainting as tensors of a given size."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ldm.data.pictures import read_picture
from ldm.errors import InputError

log = logging.getLogger(__name__)

MASK = "_mask"  # LDM's naming of masks: dog.png, dog_mask.png


def read_start(path: str | Path, multiple: int, size: tuple[int | None, int | None] = (None, None)) -> Tensor:
    """A picture [3, H, W] in [0, 1]. H and W are `size` or the picture's own, rounded down to multiples.

    Resizing is logged. Raises `InputError` for a picture that cannot be read or is smaller than one multiple.
    """
    picture = read_picture(path)
    width, height = picture.size
    wanted = tuple((given or own) // multiple * multiple for given, own in zip(size, (height, width), strict=True))
    if min(wanted) < multiple:
        raise InputError(f"{path} is {height} x {width} pixels: this model needs {multiple} x {multiple} at least")
    if wanted != (height, width):
        log.info("%s: %d x %d pixels, resized to %d x %d", path, height, width, *wanted)
        picture = picture.resize(wanted[::-1], Image.Resampling.LANCZOS)
    return rearrange(torch.from_numpy(np.array(picture)), "h w c -> c h w").float() / 255


def read_mask(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A mask [1, H, W] of zeros and ones: 1, which is white in the file, means that the model paints there.

    Raises `InputError` for a mask that cannot be read, or that has no white.
    """
    grey = read_picture(path).convert("L").resize(size[::-1], Image.Resampling.NEAREST)
    mask = (torch.from_numpy(np.array(grey)) >= 128).float()[None]
    if not mask.any():
        raise InputError(f"the mask {path} is black: make the area to paint white")
    return mask


def masked_pictures(folder: str | Path) -> list[tuple[Path, Path]]:
    """The pictures of a folder with their masks, `<name>_mask.<suffix>` beside `<name>.<suffix>`.

    Raises `InputError` for a folder without masks, and for a mask without its picture.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"--indir {folder} is not a folder; expected pictures and masks such as dog.png, dog_mask.png")
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")}
    masks = [stem for stem in files if stem.endswith(MASK)]
    if not masks:
        raise InputError(f"--indir {folder} has no masks: expected dog_mask.png beside dog.png")
    pairs = []
    for stem in masks:
        if (name := stem.removesuffix(MASK)) not in files:
            raise InputError(f"{files[stem]} has no picture: {name}.png is missing")
        pairs.append((files[name], files[stem]))
    if alone := sorted(files.keys() - {name for stem in masks for name in (stem, stem.removesuffix(MASK))}):
        log.info("%s: skipped %d without a mask: %s", folder, len(alone), ", ".join(alone[:3]))
    return pairs
