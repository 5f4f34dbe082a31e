"""Grids and labelled rows of pictures, for documents."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ldm.checkpoints import atomic_write
from ldm.generate import grid, to_pil


def save_grid(pictures: Tensor, columns: int, path: str | Path) -> None:
    """Pictures [b, 3, h, w] in 0 .. 1, row by row, as one JPEG."""
    with atomic_write(path) as beside:
        to_pil(grid(list(pictures), columns)).save(beside, quality=88)
