"""Pictures of a folder or of a list, square, as LDM's data sets of faces, LSUN and ImageNet show them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.pictures import is_picture, normalize, read_picture, region, resized
from ldm.errors import InputError, short
from ldm.files import read_text

log = logging.getLogger(__name__)


class ShuffledDraws(Dataset):
    """A set whose sample k depends only on (`seed`, k): an epoch shows every item once, in an order of its own.

    A subclass answers `item(number, draws)`: item `number` of the `count` items, with random numbers from `draws`.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, k: int) -> dict[str, Any]:
        return self.sample(k)

    def sample(self, k: int) -> dict[str, Any]:
        """Item number k of the run, k >= 0."""
        epoch, place = divmod(k, self.count)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, torch.randperm(self.count, generator=self._generator(0, epoch))
        return self.item(int(self._order[1][place]), self._generator(1, k))

    def item(self, number: int, draws: torch.Generator) -> dict[str, Any]:
        raise NotImplementedError

    def _generator(self, purpose: int, k: int) -> torch.Generator:
        state = np.random.SeedSequence((self.seed, purpose, k)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)


class ListedPictures(ShuffledDraws):
    """Items `{"image": float32 [size, size, 3] (h w c) in [-1, 1], "relpath": str}`: the largest central square.

    txt_file: paths below `data_root`, one per line; without such a file, all pictures below `data_root` count
    size: side in pixels; flip_p: probability of a horizontal flip; random_crop: a square at a random place

    Raises `InputError` if there are no pictures.
    """

    def __init__(
        self,
        data_root: str | Path,
        txt_file: str | Path | None = None,
        size: int = 256,
        interpolation: str = "bicubic",
        flip_p: float = 0.0,
        random_crop: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 8:
            raise InputError(f"size: expected a number of pixels such as 256, got {short(size)}")
        self.root = Path(data_root)
        self.names = listed(self.root, txt_file)
        self.size, self.interpolation, self.flip_p, self.random_crop = size, interpolation, flip_p, random_crop
        super().__init__(len(self.names), seed)

    def item(self, number: int, draws: torch.Generator) -> dict[str, Any]:
        name = self.names[number]
        picture = read_picture(self.root / name)
        down, right, flip = torch.rand(3, generator=draws).tolist()
        place = (down, right) if self.random_crop else (0.5, 0.5)
        shape = (self.size, self.size)
        pixels = resized(picture, shape, self.interpolation, region(picture.height, picture.width, shape, place))
        pixels = pixels.flip(2) if flip < self.flip_p else pixels
        return {"image": normalize(pixels).permute(1, 2, 0).contiguous(), "relpath": name}  # c h w -> h w c


def listed(root: Path, txt_file: str | Path | None = None) -> list[str]:
    """The pictures below a folder, or those of a list, as paths in the folder. Raises `InputError`."""
    if txt_file is not None and Path(txt_file).is_file():
        return _of_list(root, Path(txt_file))
    if not root.is_dir():
        raise InputError(f"the folder {root} does not exist: expected pictures below it; name another by data_root")
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and is_picture(path))
    if not names:
        raise InputError(f"the folder {root} has no pictures below it; name another by data_root")
    if txt_file is not None:
        log.info("%s does not exist: all %d pictures below %s are shown", txt_file, len(names), root)
    return names


def _of_list(root: Path, file: Path) -> list[str]:
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{file} is empty; expected a picture of {root} per line")
    if absent := [name for name in names if not (root / name).is_file()]:
        raise InputError(f"{file} names {absent[0]}, which is not in {root} ({len(absent)} such)")
    return names


def without(given: dict[str, Any], names: Sequence[str], what: str) -> None:
    """Raises `InputError` for arguments of the published class that are not supported here."""
    if unknown := sorted(given.keys() - set(names)):
        raise InputError(f"{what}: unknown argument {short(unknown[0])}; expected {', '.join(names)}")
