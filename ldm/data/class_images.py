"""The class pictures that `--num_class_images` still has to draw (prior preservation, arXiv 2208.12242, section
3.2)."""

from __future__ import annotations

from pathlib import Path

from ldm.data.pictures import is_picture
from ldm.errors import InputError


def missing_class_images(folder: str | Path, n: int) -> list[str]:
    """File names (`00000.png`, ...) of the pictures to add until the folder has `n`; empty if it has enough.

    Every existing picture counts, whatever its name. The numbers continue after the highest one in use, so nothing is
    overwritten, and after an interruption the result is what is still missing. The folder need not exist.

    Raises `InputError` if `folder` is a file or `n` is negative.
    """
    folder = Path(folder)
    if n < 0:
        raise InputError(f"num_class_images must not be negative, got {n}")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: expected a folder for the class pictures; name another one")
    present = [path for path in folder.iterdir() if is_picture(path)] if folder.exists() else []
    first = max((int(path.stem) + 1 for path in present if path.stem.isdecimal()), default=0)
    return [f"{number:05d}.png" for number in range(first, first + n - len(present))]
