"""Folders of cloneofsimo's lora, `0.src.jpg` with `0.mask.png` and caption.txt, as folders of captioned pictures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from ldm.data.pictures import LABEL, find_pictures
from ldm.errors import InputError
from ldm.files import read_text

SOURCE, MASK, CAPTIONS = ".src", ".mask.png", "caption.txt"


def with_captions(folder: str | Path, into: Path, replacements: Mapping[str, str]) -> int:
    """Copy `<n>.src.jpg`, `<n>.mask.png` and line n of caption.txt into a folder of pictures, masks and captions.

    replacements: parts of captions and what stands in their place. Returns the number of pictures. Raises `InputError`
    if a picture lacks its mask or its caption.
    """
    folder = Path(folder)
    sources = {path.name.partition(".")[0]: path for path in find_pictures(folder, (MASK, CAPTIONS))
               if Path(path.stem).suffix == SOURCE}  # fmt: skip
    if not sources or not all(number.isdecimal() for number in sources):
        raise InputError(f"{folder} has no pictures 0.src.jpg, 1.src.jpg, ...: expected what lora_ppim writes")
    if not (folder / CAPTIONS).is_file():
        raise InputError(f"{folder} has no {CAPTIONS}: expected a caption per line, for 0.src.jpg, 1.src.jpg, ...")
    captions = read_text(folder / CAPTIONS).splitlines()
    for number, path in sources.items():
        if int(number) >= len(captions):
            raise InputError(f"{folder / CAPTIONS} has {len(captions)} lines, and none for {path.name}")
        caption = captions[int(number)].strip()
        for part, other in replacements.items():
            caption = caption.replace(part, other)
        _copy(path, folder / f"{number}{MASK}", into, number)
        (into / f"{number}.txt").write_text(f"{caption}\n", encoding="utf-8")
    return len(sources)


def with_masks(folder: str | Path, into: Path) -> int:
    """Copy pictures, in the order of their names, and their masks `0.mask.png`, `1.mask.png`, ... as above.

    Raises `InputError` if a picture lacks its mask.
    """
    folder = Path(folder)
    pictures = [path for path in find_pictures(folder) if not path.name.endswith(MASK)]
    for number, path in enumerate(pictures):
        _copy(path, folder / f"{number}{MASK}", into, path.stem)
    return len(pictures)


def _copy(picture: Path, mask: Path, into: Path, name: str) -> None:
    if not mask.is_file():
        raise InputError(f"{picture} has no mask {mask.name}: expected white where the subject is, black elsewhere")
    into.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(picture, into / f"{name}{picture.suffix}")
    shutil.copyfile(mask, into / f"{name}{LABEL}.png")
