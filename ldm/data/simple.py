"""Captioned data sets in the `datasets` library's layouts, under the names of a widespread branch of LDM's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from ldm.data.captions import find_captions
from ldm.data.listed import ShuffledDraws
from ldm.data.pictures import decode_picture, find_pictures, normalize, read_picture, resized
from ldm.errors import InputError, explain, short

# torchvision's transforms that the published configs name, by the end of their target; nothing of them is imported.
RESIZE, RANDOM, CENTRE, FLIP = "Resize", "RandomCrop", "CenterCrop", "RandomHorizontalFlip"
PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers for filters


class HFPictures(ShuffledDraws):
    """Captioned pictures: `{image_key: float32 [h, w, 3] in [-1, 1], caption_key: str}`. See `hf_dataset`."""

    def __init__(
        self, pictures: Sequence[Any], captions: Sequence[str], transforms: Transforms, image_key: str,
        caption_key: str, seed: int,
    ) -> None:  # fmt: skip
        self.pictures, self.captions, self.transforms = pictures, captions, transforms
        self.image_key, self.caption_key = image_key, caption_key
        super().__init__(len(captions), seed)

    def item(self, number: int, draws: torch.Generator) -> dict[str, Any]:
        source = self.pictures[number]
        picture = read_picture(source) if isinstance(source, Path) else self._decoded(source.as_py(), number)
        return {self.image_key: self.transforms(picture, draws), self.caption_key: self.captions[number]}

    def _decoded(self, cell: Any, number: int) -> Image.Image:
        return decode_picture(bytes_of(cell, number), f"number {number} of the table")

    def examples(self) -> list[str]:
        """Captions for sample pictures."""
        return list(self.captions[:2])


def hf_dataset(
    name: str,
    image_transforms: Sequence[Mapping[str, Any]] = (),
    image_column: str = "image",
    text_column: str = "text",
    split: str = "train",
    image_key: str = "image",
    caption_key: str = "txt",
    data_dir: str | None = None,
    seed: int = 0,
) -> HFPictures:
    """The captioned pictures of a data set on this machine.

    name: a folder, or the name of a data set in the hub's cache: parquet files with a column of pictures and one of
    captions, or pictures with `metadata.jsonl`, `metadata.csv` or text files; data_dir: instead, as with `imagefolder`
    image_transforms: torchvision's Resize, RandomCrop, CenterCrop, RandomHorizontalFlip, as `{target, params}`
    split: the parquet files to read are those whose names begin with it, if there are any

    Nothing is downloaded. Raises `InputError`.
    """
    transforms = Transforms(image_transforms)
    folder = folder_of(data_dir or name)
    files = sorted(folder.rglob("*.parquet"))
    files = [file for file in files if file.name.startswith(split)] or files
    if files:
        pictures, captions = read_table(files, image_column, text_column)
    else:
        paths = find_pictures(folder, (".txt", ".caption", ".jsonl", ".csv"))
        found, _ = find_captions(folder, tuple(path.name for path in paths), "auto")
        if not found:
            raise InputError(f"{folder} has no captions: expected parquet files, metadata.jsonl, or .txt files")
        pictures = [path for path in paths if found.get(path.name)]
        captions = [found[path.name][0] for path in pictures]
    return HFPictures(pictures, captions, transforms, image_key, caption_key, seed)


def folder_of(name: str) -> Path:
    """The folder of a data set: the name itself, or its place in the hub's cache. Raises `InputError`."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError):
            pass
    raise InputError(
        f"no data set {short(name)}: it is neither a folder nor in the hub's cache; fetch it with "
        f"'hf download --repo-type dataset {name}', or name a folder"
    )


def read_table(files: Sequence[Path], image_column: str, text_column: str) -> tuple[Any, list[str]]:
    """The pictures (still encoded) and captions of parquet files. Raises `InputError`."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{files[0]} needs pyarrow: pip install 'position-adapters-ldm[parquet]'") from None
    with explain(f"{files[0].parent} is no readable table", arrow.ArrowException, OSError):
        names = parquet.read_schema(files[0]).names
    if absent := [name for name in (image_column, text_column) if name not in names]:
        raise InputError(f"{files[0]} has no column {absent[0]}; it has {', '.join(names)}: name them by image_column "
                         "and text_column")  # fmt: skip
    with explain(f"{files[0].parent} is no readable table", arrow.ArrowException, OSError):
        columns = [image_column, text_column]
        table = arrow.concat_tables(parquet.read_table(file, columns=columns, memory_map=True) for file in files)
    captions = table[text_column].to_pylist()
    if not captions or not all(isinstance(text, str) for text in captions):
        raise InputError(f"{files[0]}: {text_column} must hold a caption for each picture")
    return table[image_column], captions


def bytes_of(cell: Any, number: int) -> bytes:
    """The picture file in a cell of a table, `{"bytes": ...}` or bytes. Raises `InputError`."""
    content = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(content, bytes):
        raise InputError(f"picture {number} of the table is {short(cell)}; expected the bytes of a picture file")
    return content


class Transforms:
    """What the published configs do to pictures, in any order that they name it: resize, crop to a square, flip.

    Without any, a picture keeps its size. Raises `InputError` for other transforms.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]]) -> None:
        self.resize: int | list[int] | None = None
        self.crop: int | None = None
        self.is_random, self.flip_p, self.interpolation = False, 0.0, "bilinear"
        for entry in entries:
            name, params = str(entry.get("target")).rpartition(".")[2], dict(entry.get("params") or {})
            if name == RESIZE:
                self.resize = _size(params["size"])
                self.interpolation = PILLOW.get(params.get("interpolation", 2), "bicubic")
            elif name in (RANDOM, CENTRE):
                size = _size(params["size"])
                self.crop, self.is_random = size if isinstance(size, int) else min(size), name == RANDOM
            elif name == FLIP:
                self.flip_p = float(params.get("p", 0.5))
            else:
                raise InputError(f"image_transforms: {short(entry.get('target'))} is not supported; expected "
                                 f"{RESIZE}, {RANDOM}, {CENTRE} or {FLIP} of torchvision.transforms")  # fmt: skip

    def __call__(self, picture: Image.Image, draws: torch.Generator) -> torch.Tensor:
        """An RGB picture as float32 [h, w, 3] in [-1, 1]."""
        down, right, flip = torch.rand(3, generator=draws).tolist()
        height, width = self._shape(picture)
        pixels = resized(picture, (height, width), self.interpolation)
        if self.crop is not None:
            if min(height, width) < self.crop:
                raise InputError(f"a picture of {width} x {height} pixels is too small for a crop of {self.crop}; "
                                 f"put {RESIZE} before it")  # fmt: skip
            down, right = (down, right) if self.is_random else (0.5, 0.5)
            top, left = int(down * (height - self.crop + 1)), int(right * (width - self.crop + 1))
            pixels = pixels[:, top : top + self.crop, left : left + self.crop]
        pixels = pixels.flip(2) if flip < self.flip_p else pixels
        return normalize(pixels).permute(1, 2, 0).contiguous()  # c h w -> h w c

    def _shape(self, picture: Image.Image) -> tuple[int, int]:
        """Height and width after resizing; a single number is the length of the shorter side."""
        if self.resize is None:
            return picture.height, picture.width
        if not isinstance(self.resize, int):
            return self.resize[0], self.resize[1]
        factor = self.resize / min(picture.size)
        return round(picture.height * factor), round(picture.width * factor)


def _size(given: Any) -> int | list[int]:
    sizes = given if isinstance(given, list) else [given]
    if not 1 <= len(sizes) <= 2 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise InputError(f"image_transforms: size must be pixels such as 512 or [512, 512], got {short(given)}")
    return given if len(sizes) == 2 else sizes[0]


class TextOnly(Dataset):
    """Captions with black pictures: as a validation set, the `prompts` of sample pictures, and no loss.

    output_size: side of the pictures; n_gpus: how often the captions are repeated, one for each process
    """

    def __init__(
        self,
        captions: Sequence[str],
        output_size: int = 512,
        image_key: str = "image",
        caption_key: str = "txt",
        n_gpus: int = 1,
    ) -> None:
        if not captions or not all(isinstance(text, str) for text in captions):
            raise InputError(f"captions: expected a list of texts, got {short(captions)}")
        self.captions, self.prompts, self.size = list(captions) * n_gpus, list(captions), output_size
        self.image_key, self.caption_key = image_key, caption_key

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, k: int) -> dict[str, Any]:
        return {self.image_key: torch.full((self.size, self.size, 3), -1.0), self.caption_key: self.captions[k]}
