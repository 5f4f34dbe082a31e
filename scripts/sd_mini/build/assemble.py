"""Records of the captioned pictures: the captions, split and sampling weight of each picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from scripts.sd_mini.build.drawings import Drawing, by_code, by_image, by_name, drawings, read_picture
from scripts.sd_mini.build.emoji import read_emoji
from scripts.sd_mini.build.photographs import NAMES, read_sheets
from scripts.sd_mini.build.words import class_word, drawing_captions, photo_captions

Record = tuple[dict, np.ndarray]
FLAG_WEIGHT = 0.3  # 270 of the 1,900 emoji are flags


def all_drawings(folders: dict[str, Path]) -> list[Drawing]:
    """Every drawing of every vendor, by the folders of the packages in `scripts.sd_mini.build.packages.PACKAGES`."""
    table = read_emoji(folders["names"], folders["words"])
    return [
        *drawings(table, "noto", "noto", by_image(folders["noto"] / "img/google/64")),
        *drawings(table, "twemoji", "twemoji", by_image(folders["twemoji"] / "img/twitter/64")),
        *drawings(table, "fluent", "fluent", by_code(folders["fluent"] / "assets", ".webp")),
        *drawings(table, "flat", "fluent", by_name(folders["flat"] / "icons/flat")),
        *drawings(table, "modern", "fluent", by_name(folders["flat"] / "icons/modern")),
        *drawings(table, "openmoji", "openmoji", by_code(folders["openmoji"] / "color/svg", ".svg")),
    ]


def drawing_records(chosen: Iterable[tuple[Drawing, str]], size: int = 64, processes: int = 2) -> Iterator[Record]:
    """Records of drawings with their RGBA pictures; the tones of one thing share a weight that grows as their root."""
    chosen = list(chosen)
    tones = Counter((d.style, d.emoji.name) for d, _ in chosen)
    with ProcessPoolExecutor(processes) as pool:
        pictures = pool.map(partial(read_picture, size=size), [d.path for d, _ in chosen], chunksize=64)
        for (drawing, split), picture in zip(chosen, pictures, strict=True):
            emoji = drawing.emoji
            weight = tones[drawing.style, emoji.name] ** -0.5 * (FLAG_WEIGHT if "flag" in emoji.group else 1.0)
            yield (
                {
                    "captions": drawing_captions(emoji, drawing.style),
                    "split": split,
                    "kind": "drawing",
                    "style": drawing.style,
                    "name": emoji.name,
                    "tone": emoji.tone,
                    "class": class_word(emoji),
                    "group": emoji.group,
                    "code": emoji.code,
                    "weight": round(weight, 4),
                },
                picture,
            )


def photo_records(folder: Path, train: int, held_out: int) -> Iterator[Record]:
    """Records of photographs with their 32 x 32 RGB pictures: so many for training, so many (of the test sheet) not."""
    for part, split, count in (("train", "train", train), ("test", "val_known", held_out)):
        pictures, labels = read_sheets(folder, part, count // len(NAMES))
        for picture, label in zip(pictures, labels.tolist(), strict=True):
            names = NAMES[label]
            yield (
                {
                    "captions": photo_captions(names),
                    "split": split,
                    "kind": "photo",
                    "style": "photo",
                    "name": names[0],
                    "class": names[0],
                    "weight": 1.0,
                },
                picture,
            )
