"""DreamBooth's two sets of captioned pictures: the subject and its class (arXiv 2208.12242, section 3)."""

from __future__ import annotations

import logging
import string
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kornia.geometry.transform import hflip
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data.captions import TABLES, Captions, extensions_of, read_settings, tell_unread
from ldm.data.pictures import INTERPOLATIONS, find_pictures, fit_square, normalize, picture_size, read_picture, some
from ldm.errors import InputError, short

log = logging.getLogger(__name__)

Item = dict[str, Any]


class Choice(NamedTuple):
    """One draw: the number of the picture, whether it is flipped, and its caption."""

    number: int
    flipped: bool
    caption: str


SETS = ("train", "val", "validation", "test")
PURPOSES = ("sample", "order", "mask", "caption", "crop", "colours")  # each has random numbers of its own
CACHE_BYTES = 512 * 2**20  # pictures kept in memory per dataset and worker: 680 of 512 pixels


class PersonalizedBase(Dataset):
    """The pictures of one folder with captions. Sample k depends only on (`seed`, k).

    `dataset[k]` is sample k, counted over the whole run: k may exceed `len()`, and epoch `k // len()` has its own
    order. No global random state is used, so workers, epoch boundaries and restarts do not change sample k.

    An item is `{"image": float32 [size, size, 3] (h w c) in [-1, 1], "caption": str}`, and with `sizes` what SDXL is
    conditioned on (arXiv 2307.01952, section 2.2): `original_size_as_tuple`, `crop_coords_top_left` and
    `target_size_as_tuple`, float32 [2] each, (height, width) or (top, left) in pixels.

    Args:
        data_root: folder with the pictures, see `find_pictures`. size: side of the square in pixels. repeats: how often
        one epoch shows each picture, `len()` is pictures * repeats. interpolation: one of
        `ldm.data.pictures.INTERPOLATIONS`. flip_p: probability of a horizontal flip (`set="train"` only). set: "train"
        shuffles and flips; "val", "validation" and "test" go through the pictures in order. placeholder_token: the
        identifier, in LDM's name for it. per_image_tokens: with probability `mixing_prob`, the caption has an
        identifier for the single picture: the shared
            one followed by the picture's number, `sks0`, `sks1`, ...
        center_crop: keep the central square; False squeezes the whole picture into the square, as LDM did.
        mixing_prob: see `per_image_tokens`.
        coarse_class_text: words before the identifier, for instance an adjective that all pictures share.
        reg: the pictures show the class, not the subject: captions have no identifier.
        class_word: what the subject is, for instance "dog".
        templates: one caption or several to choose from. `{}` stands for the subject ("sks dog"; in class captions
            "dog"), `{identifier}` and `{word}` for its parts. None: every picture has a caption of its own.
        identifier: the rare token that names the subject; wins over `placeholder_token`.
        seed: of the order, the flips and the choice of templates.
        cache: keep decoded pictures in memory, up to `CACHE_BYTES`.
        sizes: items include the size of the file's picture, the corner of the crop, and the size of the square.
        captions: where captions are from, see `ldm.data.captions`; the template is for pictures without. By default
            the template makes all of them.

    Raises `InputError`, which names the argument, for invalid values, and as `find_pictures` and `read_picture` do.
    """

    why_not_cached: str | None = None  # why pictures differ at each draw, so that they cannot be encoded once
    has_subject = True  # so captions should have its identifier
    read_elsewhere: Sequence[str] = ()  # endings of files beside the pictures that are no surprise

    def __init__(
        self,
        data_root: str | Path,
        size: int | None = None,
        repeats: int = 100,
        interpolation: str = "bicubic",
        flip_p: float = 0.5,
        set: str = "train",
        placeholder_token: str = "sks",
        per_image_tokens: bool = False,
        center_crop: bool = True,
        mixing_prob: float = 0.25,
        coarse_class_text: str | None = None,
        reg: bool = False,
        class_word: str | None = None,
        templates: str | Sequence[str] | None = "photo of a {}",
        identifier: str | None = None,
        seed: int = 0,
        cache: bool = True,
        sizes: bool = False,
        captions: str | Mapping | None = None,
    ) -> None:
        _check("data_root", data_root, isinstance(data_root, (str, Path)), "the path of a folder with pictures")
        _check("size", size, _is_count(size), "a number of pixels such as 512")
        _check("repeats", repeats, _is_count(repeats), "a whole number of at least 1")
        kinds = tuple(INTERPOLATIONS)
        _check("interpolation", interpolation, interpolation in kinds, f"one of {', '.join(kinds)}")
        _check("flip_p", flip_p, _is_probability(flip_p), "a probability from 0 to 1")
        _check("mixing_prob", mixing_prob, _is_probability(mixing_prob), "a probability from 0 to 1")
        _check("set", set, set in SETS, f"one of {', '.join(SETS)}")
        _check("seed", seed, seed == 0 or _is_count(seed), "a whole number that is not negative")
        flags = {"per_image_tokens": per_image_tokens, "center_crop": center_crop, "reg": reg, "cache": cache}
        flags["sizes"] = sizes
        for name, value in flags.items():
            _check(name, value, isinstance(value, bool), "true or false")
        identifier = placeholder_token if identifier is None else identifier
        _check("identifier", identifier, _is_text(identifier), "a rare token such as sks")
        _check("class_word", class_word, _is_text(class_word) or class_word is None and not reg, "a word such as dog")
        coarse = coarse_class_text
        _check("coarse_class_text", coarse, coarse is None or isinstance(coarse, str), "some words or nothing")

        self.size, self.interpolation, self.center_crop, self.cache = size, interpolation, center_crop, cache
        self.shuffle = set == "train"
        self.flip_p = flip_p if self.shuffle else 0.0
        self.mixing_prob = mixing_prob if per_image_tokens else 0.0
        self.reg, self.seed, self.sizes = reg, seed, sizes
        self.identifier, self.class_word, self.coarse_class_text = identifier, class_word, coarse
        self.templates = _read_templates(templates, self._parts(identifier)) if templates is not None else []
        settings = read_settings(captions)
        self.paths = find_pictures(data_root, (*extensions_of(settings), *TABLES, *self.read_elsewhere))
        self.captions = Captions(data_root, self.paths, settings)
        if captions is None:
            option = "data.params.reg.params.captions=auto" if reg else "--captions auto"
            tell_unread(Path(data_root), tuple(path.name for path in self.paths), option)
        self._check_captions(Path(data_root))
        self._length = len(self.paths) * repeats
        self._pixels: dict[int, Tensor] = {}
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Samples in one epoch."""
        return self._length

    def __iter__(self) -> Iterator[Item]:
        """The draws of the first epoch. Without this method, iteration would never end, because every k is valid."""
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: int) -> Item:
        return self.sample(k)

    def sample(self, k: int) -> Item:
        """Sample k of the run, k >= 0, with the shapes above. Raises `IndexError` for a negative k."""
        return self.item(self.picture_of(k), k)

    def item(self, number: int, k: int) -> Item:
        """Picture `number` with the random choices of sample k."""
        chosen = self.choice(number, k)
        return {"image": self.picture(chosen.number, chosen.flipped), **self.beside(chosen)}

    def beside(self, chosen: Choice) -> Item:
        """What an item has besides its picture."""
        return {"caption": chosen.caption, **self.sizes_of(chosen.number)}

    def sizes_of(self, number: int) -> dict[str, Tensor]:
        """The entries of an item for the size of picture `number`; empty without `sizes`."""
        if not self.sizes:
            return {}
        height, width = picture_size(self.paths[number])
        side = min(height, width)
        corner = [(length - side) * self.size // (2 * side) * self.center_crop for length in (height, width)]
        return self._sizes((height, width), corner, (self.size, self.size))

    @staticmethod
    def _sizes(original: Sequence[int], corner: Sequence[int], target: Sequence[int]) -> dict[str, Tensor]:
        """What SDXL is conditioned on, each (height, width) or (top, left)."""
        names = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
        pairs = zip(names, (original, corner, target), strict=True)
        return {name: torch.tensor(pair, dtype=torch.float32) for name, pair in pairs}

    def choose(self, k: int) -> Choice:
        """The draw of sample k. Raises `IndexError` for a negative k."""
        return self.choice(self.picture_of(k), k)

    def choice(self, number: int, k: int) -> Choice:
        """Picture `number` with the flip and the caption of sample k."""
        flip, mix, choice = torch.rand(3, generator=self._generator("sample", k)).tolist()
        identifier = f"{self.identifier}{number}" if mix < self.mixing_prob else self.identifier
        if texts := self.captions.texts[number]:
            caption = self.captions.draw(texts, self._generator("caption", k) if self.shuffle else None)
        else:
            template = self.templates[int(choice * len(self.templates))]
            caption = template.format_map(self._parts(identifier))
        return Choice(number, flip < self.flip_p, caption)

    def picture(self, number: int, flipped: bool) -> Tensor:
        """Picture `number` as [h, w, 3] in [-1, 1], where both sides are `size`."""
        return as_item(self._read(number), flipped)

    @property
    def crops(self) -> bool | str:
        """What is cut off pictures, for those who keep them."""
        return self.center_crop

    def shape_of(self, number: int) -> tuple[int, int]:
        """(height, width) of picture `number` in items."""
        return self.size, self.size

    def all_captions(self) -> list[str]:
        """Every caption that a draw can have, with all its tags in the order in which they are written."""
        alone = [number for number, texts in enumerate(self.captions.texts) if not texts]
        own = [f"{self.identifier}{number}" for number in alone] if self.mixing_prob else []
        names = [*([self.identifier] if self.mixing_prob < 1 and alone else []), *own]
        made = {t.format_map(self._parts(name)) for t in self.templates for name in names}
        return sorted(made | {self.captions.framed(text) for texts in self.captions.texts for text in texts})

    def _check_captions(self, folder: Path) -> None:
        """Raises `InputError` for a picture that has neither a caption nor a template."""
        texts = self.captions.texts
        lacking = [path.name for path, own in zip(self.paths, texts, strict=True) if not own]
        if lacking and not self.templates:
            raise InputError(
                f"{folder}: no caption for {some(lacking)}; write {Path(lacking[0]).stem}.txt beside it, choose "
                "another source of captions (filename, folder), or give templates"
            )
        named = any(self.identifier in self.captions.framed(text) for own in texts for text in own)
        if any(texts) and self.has_subject and not self.reg and not named:
            _tell_unnamed(folder, self.identifier, f"{self.identifier} {self.class_word or ''}".strip())

    def picture_of(self, k: int) -> int:
        """The number of the picture that sample k shows. Raises `IndexError` for a negative k."""
        if k < 0:
            raise IndexError(f"draws are counted from 0, got {k}")
        epoch, place = divmod(k, len(self))
        if self._order is None or self._order[0] != epoch:
            generator = self._generator("order", epoch) if self.shuffle else None
            self._order = epoch, self.epoch_order(generator)
        return int(self._order[1][place])

    def epoch_order(self, generator: torch.Generator | None) -> Tensor:
        """The numbers of the pictures of one epoch, [len]; without a generator in their own order."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        return order % len(self.paths)

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        """A separate generator for every draw and every epoch; the two sets of a pair have different ones."""
        key = (self.seed, self.reg, PURPOSES.index(purpose), number)
        state = np.random.SeedSequence([int(part) for part in key]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)

    def _read(self, number: int) -> Tensor:
        """uint8 [3, h, w], from memory if it was read before."""
        if number in self._pixels:
            return self._pixels[number]
        pixels = self._fitted(number)
        if self.cache and (len(self._pixels) + 1) * pixels.nbytes <= CACHE_BYTES:
            self._pixels[number] = pixels
        return pixels

    def _fitted(self, number: int) -> Tensor:
        """uint8 [3, size, size]."""
        return fit_square(read_picture(self.paths[number]), self.size, self.interpolation, self.center_crop)

    def _parts(self, identifier: str) -> dict[str, str]:
        """The values of the fields of a template."""
        named = {"word": self.class_word} if self.reg else {"identifier": identifier, "word": self.class_word}
        named = {field: text for field, text in named.items() if text}
        return {"subject": " ".join(filter(None, (self.coarse_class_text, *named.values()))), **named}


def as_item(pixels: Tensor, flipped: bool) -> Tensor:
    """[3, h, w] in 0..255 -> float32 [h, w, 3] in [-1, 1], flipped or not."""
    values = normalize(pixels)
    return (hflip(values) if flipped else values).permute(1, 2, 0).contiguous()  # c h w -> h w c


@cache
def _tell_unnamed(folder: Path, identifier: str, subject: str) -> None:
    """Once for each folder, even if several datasets read it."""
    log.warning("%s: no caption has the identifier %s; add it, or captions.prefix=%r", folder, identifier, subject)


class DreamBoothPairs(Dataset):
    """Sample k of the subject with sample k of its class; collated, LDM's `[train batch, class batch]`.

    An item is `(instance item,)` or `(instance item, class item)`; `len()` is that of the instance set, and a shorter
    class set starts over in a new order.
    """

    def __init__(self, instance: PersonalizedBase, reg: PersonalizedBase | None = None) -> None:
        self.sets = (instance,) if reg is None else (instance, reg)

    def __len__(self) -> int:
        return len(self.sets[0])

    def __iter__(self) -> Iterator[tuple[Item, ...]]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: int) -> tuple[Item, ...]:
        return tuple(pictures[k] for pictures in self.sets)


def _read_templates(templates: str | Sequence[str], parts: dict[str, str]) -> list[str]:
    """The templates as a list, with `{subject}` for `{}`. Raises `InputError` for unknown fields."""
    templates = [templates] if isinstance(templates, str) else templates
    usable = isinstance(templates, Sequence) and len(templates) > 0 and all(map(_is_text, templates))
    _check("templates", templates, usable, "a caption such as 'photo of a {}', or a list of them")
    templates = [template.replace("{}", "{subject}") for template in templates]
    for template in templates:
        try:
            fields = {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
        except ValueError as error:
            raise InputError(f"templates: {template!r} cannot be read: {error}; a field is {{}} or {{word}}") from None
        if not fields <= parts.keys():
            unknown = ", ".join(sorted(fields - parts.keys()))
            known = ", ".join(f"{{{field}}}" for field in parts if field != "subject")
            raise InputError(f"templates: {template!r} has the field {unknown!r}, expected {{}} or {known}")
    return templates


def _check(name: str, value: Any, good: bool, expected: str) -> None:
    if not good:
        raise InputError(f"{name}: expected {expected}, got {short(value)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
