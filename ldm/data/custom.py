"""Custom Diffusion's pictures of a concept and of its class, rescaled at random (arXiv 2212.04488, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.pictures import INTERPOLATIONS, find_pictures, fit_square, normalize, read_picture
from ldm.errors import InputError, short
from ldm.files import read_json, read_text

OBJECT_TEMPLATES = ("photo of a {}", "a photo of the {}", "a picture of a {}", "a cropped photo of a {}", "one {}")
STYLE_TEMPLATES = (
    "a picture in the style of {}",
    "a painting by {}",
    "art in {} style",
    "a drawing in the style of {}",
)

# Words in the prompt for pictures that were shrunk below 0.6 of the frame, or enlarged beyond it.
SMALL, LARGE = ("a far away ", "very small "), ("zoomed in ", "close up ")

# Keys of one concept, here and in diffusers' `concepts_list` files, which give whole prompts.
CONCEPT = ("datapath", "caption", "reg_datapath", "reg_caption")
DIFFUSERS = dict(zip(("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt"), CONCEPT, strict=True))


class MaskBase(Dataset):
    """Pictures of one concept, alternating with pictures of its class if there are any.

    An item is `{"image": float32 [size, size, 3] (h w c) in [-1, 1], "caption": str, "mask": float32 [size, size]}`;
    the mask is 1 inside the picture. Sample k depends only on (`seed`, k): draws 0, 2, ... show the concept, draws
    1, 3, ... its class; each set shows every picture once before it repeats one.

    Args:
        datapath: a folder of pictures, or a text file with the path of one in each line.
        caption: what they show (`<new1> dog`), which is put into the templates, or a text file (.txt) with one caption
            per line for each picture.
        reg_datapath, reg_caption: the same for the class. size: side of the square in pixels. flip_p: probability of a
        horizontal flip. aug: rescale the concept's pictures: with probability 2/3 to between a third and the whole of
        the frame, on grey;
            else to 1.2 to 1.4 times the frame, which then shows a part.
        style: the concept is a style; other templates.
        repeat: how often each picture of the concept counts for the length of an epoch.
        templates: instead of the default ones; `{}` stands for the caption.

    Raises `InputError` for invalid arguments, and as `find_pictures` and `read_picture` do.
    """

    def __init__(
        self,
        datapath: str | None = None,
        caption: str | None = None,
        reg_datapath: str | None = None,
        reg_caption: str | None = None,
        size: int = 512,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
        aug: bool = True,
        style: bool = False,
        repeat: float = 0,
        templates: str | Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        if not datapath or not caption:
            raise InputError("a concept needs --datapath, a folder of pictures, and --caption, what they show")
        if interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {short(interpolation)}")
        if not isinstance(size, int) or size < 8:
            raise InputError(f"size: expected a number of pixels such as 512, got {short(size)}")
        if not 0 <= flip_p <= 1:
            raise InputError(f"flip_p: expected a probability from 0 to 1, got {short(flip_p)}")
        self.size, self.interpolation, self.flip_p, self.aug, self.seed = size, interpolation, flip_p, aug, seed
        templates = [templates] if isinstance(templates, str) else templates
        self.templates = list(templates or (STYLE_TEMPLATES if style else OBJECT_TEMPLATES))
        self.caption, self.reg_caption = caption, reg_caption
        self.sets = [_pictures(datapath, caption)]
        if reg_datapath:
            if not reg_caption:
                raise InputError(f"--reg_datapath {reg_datapath} needs --reg_caption, what its pictures show")
            self.sets.append(_pictures(reg_datapath, reg_caption))
        own = len(self.sets[0]) * max(1, int(repeat))
        self._length = max(own, *map(len, self.sets)) * len(self.sets) if len(self.sets) > 1 else own
        self._order: dict[int, tuple[int, Tensor]] = {}

    def __len__(self) -> int:
        """Samples in one epoch."""
        return self._length

    def __getitem__(self, k: int) -> dict[str, Any]:
        return self.sample(k)

    def sample(self, k: int) -> dict[str, Any]:
        """Item number k of the run, k >= 0."""
        j, number = divmod(k, len(self.sets))
        path, caption = self.sets[number][self._place(number, j)]
        draws = self._generator("sample", number, j)
        flip, choice = torch.rand(2, generator=draws).tolist()
        if caption is None:
            words = self.reg_caption if number else self.caption
            caption = self.templates[int(choice * len(self.templates))].replace("{}", words)
        scale = self._scale(draws) if self.aug and number == 0 else self.size
        pixels = normalize(fit_square(read_picture(path), scale, self.interpolation))
        image, mask = place(pixels, self.size, draws)
        if flip < self.flip_p:
            image, mask = image.flip(2), mask.flip(1)
        return {
            "image": image.permute(1, 2, 0).contiguous(),  # c h w -> h w c
            "caption": describe(scale / self.size, draws) + caption,
            "mask": mask.contiguous(),
        }

    def examples(self) -> list[str]:
        """A caption of the concept and one of its class, for sample pictures."""
        named = [self.caption, self.reg_caption][: len(self.sets)]
        first = [pictures[0][1] for pictures in self.sets]
        return [text or self.templates[0].replace("{}", words) for text, words in zip(first, named, strict=True)]

    def _scale(self, draws: torch.Generator) -> int:
        """The side length that a picture is resized to."""
        low, high = (1 / 3, 1.0) if _uniform(draws) < 2 / 3 else (1.2, 1.4)
        return round((low + (high - low) * _uniform(draws)) * self.size)

    def _place(self, number: int, j: int) -> int:
        """The number of the picture that the j-th draw of a set shows."""
        epoch, place = divmod(j, len(self.sets[number]))
        if self._order.get(number, (None, None))[0] != epoch:
            order = torch.randperm(len(self.sets[number]), generator=self._generator("order", number, epoch))
            self._order[number] = epoch, order
        return int(self._order[number][1][place])

    def _generator(self, purpose: str, number: int, j: int) -> torch.Generator:
        key = (self.seed, number, ("sample", "order").index(purpose), j)
        state = np.random.SeedSequence(key).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)


def place(pixels: Tensor, size: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """A picture [3, s, s] at a place in a grey frame [3, size, size], or a crop of a larger one; mask [size, size]."""
    side = pixels.shape[1]
    top, left = (int(_uniform(draws) * (abs(size - side) + 1)) for _ in range(2))
    if side >= size:
        return pixels[:, top : top + size, left : left + size], torch.ones(size, size)
    image, mask = torch.zeros(3, size, size), torch.zeros(size, size)  # 0 in [-1, 1] is grey
    image[:, top : top + side, left : left + side] = pixels
    mask[top : top + side, left : left + side] = 1
    return image, mask


def describe(share: float, draws: torch.Generator) -> str:
    """The first words of the caption for a picture of this size relative to the frame."""
    words = SMALL if share < 0.6 else LARGE if share > 1 else ("",)
    return words[int(_uniform(draws) * len(words))]


class Concepts(Dataset):
    """Several concepts: sample k has sample k of each one. Collated, it is a list of batches, whose losses are
    added."""

    def __init__(self, concepts: Sequence[Dataset]) -> None:
        self.concepts = list(concepts)

    def __len__(self) -> int:
        return max(map(len, self.concepts))

    def __getitem__(self, k: int) -> tuple[dict[str, Any], ...]:
        return self.sample(k)

    def sample(self, k: int) -> tuple[dict[str, Any], ...]:
        """Sample k of the run: one of each concept."""
        return tuple(concept.sample(k) for concept in self.concepts)

    def examples(self) -> list[str]:
        """Captions of all concepts and of their classes, for sample pictures."""
        return [caption for concept in self.concepts for caption in concept.examples()]


def read_concepts(path: str | Path, more: Sequence[str] = ()) -> list[dict[str, str]]:
    """The concepts of a `concepts_list` file: JSON, a list of mappings with our keys (`CONCEPT`) or those of diffusers.

    `more`: other keys that entries may have.

    Raises `InputError` for an unreadable file, unknown or missing keys, and folders that do not exist.
    """
    entries = read_json(path)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"--concepts_list {path}: expected a JSON list of mappings with {', '.join(CONCEPT)}")
    concepts = []
    for number, entry in enumerate(entries, 1):
        if unknown := entry.keys() - {*CONCEPT, *DIFFUSERS, *more}:
            raise InputError(
                f"--concepts_list {path}: concept {number} has the unknown key {', '.join(sorted(unknown))}"
            )
        concept = {DIFFUSERS.get(key, key): value for key, value in entry.items()}
        if entry.keys() & DIFFUSERS.keys():
            concept["templates"] = "{}"
        if not concept.get("datapath") or not concept.get("caption"):
            raise InputError(f"--concepts_list {path}: concept {number} lacks its folder of pictures or its caption")
        for key in ("datapath", "reg_datapath"):
            if concept.get(key) and not Path(concept[key]).exists():
                raise InputError(f"--concepts_list {path}: {concept[key]} of concept {number} does not exist")
        concepts.append(concept)
    return concepts


def _pictures(where: str, caption: str) -> list[tuple[Path, str | None]]:
    """Pictures with their captions; None instead of captions if one caption is for all of them."""
    paths = _listed(Path(where)) if Path(where).is_file() else find_pictures(where)
    captions: list[Any] = [None] * len(paths)
    if caption.endswith(".txt"):
        captions = _lines(caption)
    if len(captions) != len(paths):
        raise InputError(f"{caption} has {len(captions)} captions for the {len(paths)} pictures of {where}")
    return list(zip(paths, captions, strict=True))


def _listed(file: Path) -> list[Path]:
    """The pictures of a list: paths from the working directory or, if there is none, from the list's folder."""
    return [path if path.exists() else file.parent / path for path in map(Path, _lines(str(file)))]


def _lines(path: str) -> list[str]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    if not any(lines):
        raise InputError(f"{path} is empty; expected a line for each picture")
    return [line for line in lines if line]


def _uniform(draws: torch.Generator) -> float:
    return torch.rand((), generator=draws).item()
