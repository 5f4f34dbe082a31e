"""Captioned pictures in memory: photographs, and drawings with alpha that get a new background at every draw.

The file is a webdataset: a tar (compressed or not) in which `<key>.json` and `<key>.webp` are neighbours. The JSON
holds `captions` (list), `split`, `kind` ("drawing" or "photo"), `weight` (how often, among its kind) and further facts.
Sample k depends only on (seed, k), not on earlier draws, batches or processes.
"""

from __future__ import annotations

import io
import logging
import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.errors import InputError, explain, short
from ldm.files import parse_json

log = logging.getLogger(__name__)

MEMBER_BYTES = 2**26  # of one record or picture
COLOURS = {
    "white": (255, 255, 255), "black": (20, 20, 24), "grey": (150, 150, 155), "red": (215, 45, 45),
    "orange": (240, 145, 40), "yellow": (248, 215, 70), "green": (60, 160, 75), "blue": (50, 105, 215),
    "purple": (130, 70, 185), "brown": (130, 90, 60), "pink": (245, 135, 180), "light grey": (222, 222, 226),
    "light blue": (180, 215, 248), "light green": (190, 232, 190), "light yellow": (252, 242, 190),
    "light pink": (250, 212, 225), "light purple": (216, 200, 242), "turquoise": (70, 200, 195),
}  # fmt: skip
WHITE, PLAIN, GRADIENT, STRIPES, CHECKS = range(5)
KIND_SHARES = torch.tensor([0.3, 0.4, 0.16, 0.07, 0.07], dtype=torch.float64)
TOLD = (0.3, 0.6, 0.3, 0.4, 0.4)  # how often the caption mentions a background of that kind


class CaptionedPictures(Dataset):
    """Pictures of one split with captions, drawn at random by weight. All of them are held as one uint8 tensor.

    path: the tar; split: one name or several; size: h and w in pixels; seed: with the draw number, decides everything
    random; draws: the length of the dataset (default: the number of pictures); shares: the fraction of draws of each
    kind, e.g. {"drawing": 0.6, "photo": 0.4} (default: by the pictures' weights); emphasis: a factor of the weight by
    class, e.g. {"animal": 3} (default: 1); group_emphasis: the same by group of emoji, e.g. {"warning": 0.1}; a picture
    with both gets the product. Raises `InputError` if the file is absent or broken, or has no picture of that split,
    kind, class or group.
    """

    def __init__(
        self,
        path: str | Path,
        split: str | Sequence[str] = "train",
        size: int = 64,
        seed: int = 0,
        draws: int | None = None,
        shares: Mapping[str, float] | None = None,
        emphasis: Mapping[str, float] | None = None,
        group_emphasis: Mapping[str, float] | None = None,
    ):
        wanted = {split} if isinstance(split, str) else set(split)
        self.records, pictures = [], []
        for record, encoded in read_records(path, wanted):
            pictures.append(decode(encoded, size, f"{path}, picture {record.get('name')!r}"))
            self.records.append(record)
        if not pictures:
            raise InputError(f"{path} has no picture of split {sorted(wanted)}; check data.params.*.split")
        self.pixels = torch.from_numpy(np.stack(pictures))  # n h w 4
        self.size, self.seed, self.draws = size, seed, draws or len(pictures)
        self.captions = [record["captions"] for record in self.records]
        self._caption_counts = torch.tensor([len(captions) for captions in self.captions])
        self._opaque = torch.tensor([record.get("kind") == "photo" for record in self.records])
        self._cumulative = torch.cumsum(row_weights(self.records, shares, emphasis or {}, group_emphasis or {}), 0)

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, k: int) -> dict[str, Tensor | str]:
        """Sample k: `image` float32 [h, w, 3] in -1..1, `caption` str."""
        return self.__getitems__([k])[0]

    sample = __getitem__

    def __getitems__(self, ks: Sequence[int]) -> list[dict[str, Tensor | str]]:
        """Several draws, which are composed with their backgrounds together."""
        batch = self.batch(ks)
        return [{"image": i, "caption": c} for i, c in zip(batch["image"], batch["caption"], strict=True)]

    def to(self, device: str | torch.device) -> CaptionedPictures:
        """Move the pictures to a device, on which `batch` then composes them."""
        self.pixels = self.pixels.to(device)
        return self

    def batch(self, ks: Sequence[int] | Tensor) -> dict[str, Tensor | list[str]]:
        """Samples ks: `image` float32 [b, h, w, 3] in -1..1 on the pictures' device, `caption` b strings, `row` [b]."""
        ks = torch.as_tensor(ks, dtype=torch.int64)
        u = uniforms(self.seed, ks, 16)  # b 16
        rows = torch.searchsorted(self._cumulative, u[:, 0] * self._cumulative[-1]).clamp(max=len(self.records) - 1)
        device = self.pixels.device
        background, words = draw_backgrounds(u[:, 3:], self.size, device)
        opaque = self._opaque[rows]
        picture = self.pixels[rows.to(device)]  # b h w 4
        mirrored = (opaque & (u[:, 2] < 0.5)).to(device)  # the caption of a mirrored drawing may be wrong
        picture = torch.where(mirrored[:, None, None, None], picture.flip(2), picture)
        chosen = (u[:, 1] * self._caption_counts[rows]).long()
        captions = [self.captions[row][i] for row, i in zip(rows.tolist(), chosen.tolist(), strict=True)]
        captions = [c if o else c + w for c, w, o in zip(captions, words, opaque.tolist(), strict=True)]
        return {"image": compose(picture, background), "caption": captions, "row": rows}

    def shown(self, rows: Sequence[int] | Tensor, colour: str = "white") -> Tensor:
        """Pictures by row number on one plain colour: float32 [b, h, w, 3] in -1..1, for evaluation."""
        picture = self.pixels[torch.as_tensor(rows, device=self.pixels.device)]
        return compose(picture, torch.tensor(COLOURS[colour], dtype=torch.float32, device=picture.device))


def read_records(path: str | Path, splits: set[str] | None = None) -> Iterator[tuple[dict, bytes]]:
    """The records of a file in order, each with its encoded picture; of all splits, or of the named ones."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no captioned pictures at {path}; scripts/sd_mini/build_captioned_pictures.py builds them")
    with explain(
        f"{path} is no readable tar of captioned pictures; build it again", tarfile.TarError, EOFError, OSError
    ):
        with tarfile.open(path, "r|*") as archive:
            record = {}
            for member in archive:
                if member.name.endswith(".json"):
                    record = parse_json(_bytes(archive, member, path).decode(), f"{path}: {short(member.name)}")
                elif splits is None or record.get("split") in splits:
                    yield record, _bytes(archive, member, path)


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    """One file of the archive. Raises `InputError` for other members, and for files that are too large."""
    if not member.isfile() or member.size > MEMBER_BYTES:
        raise InputError(f"{path}: {short(member.name)} is no file of at most {MEMBER_BYTES} bytes; build it again")
    return archive.extractfile(member).read()


def decode(encoded: bytes, size: int, what: str) -> np.ndarray:
    """An encoded picture as uint8 [size, size, 4]; another size is resized with Lanczos' filter."""
    with explain(f"{what} cannot be decoded; build the file again", OSError):
        image = Image.open(io.BytesIO(encoded)).convert("RGBA")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def row_weights(
    records: Sequence[Mapping],
    shares: Mapping[str, float] | None,
    emphasis: Mapping[str, float],
    group_emphasis: Mapping[str, float],
) -> Tensor:
    """The probability of each record, float64 [n]: its weight times the emphasis of its class and group, scaled to the
    share of its kind."""
    weights = torch.tensor([record.get("weight", 1.0) for record in records], dtype=torch.float64)
    for option, key, factors in (("emphasis", "class", emphasis), ("group_emphasis", "group", group_emphasis)):
        own = [record.get(key) for record in records]
        if unknown := set(factors) - set(own):
            raise InputError(f"{option}: no picture is of the {key} {', '.join(sorted(unknown))}")
        weights *= torch.tensor([factors.get(value, 1.0) for value in own], dtype=torch.float64)
    if shares is None:
        return weights
    kinds = [record.get("kind") for record in records]
    if unknown := set(kinds) ^ set(shares):
        raise InputError(f"shares must name the kinds {sorted(set(kinds))}; wrong or missing: {sorted(unknown)}")
    for kind, share in shares.items():
        of_kind = torch.tensor([k == kind for k in kinds])
        weights[of_kind] *= share / weights[of_kind].sum()
    return weights


def uniforms(seed: int, ks: Tensor, count: int) -> Tensor:
    """Random numbers in [0, 1) by counter, float64 [b, count]: splitmix64 of (seed, k, column)."""
    x = (torch.as_tensor(ks).cpu()[:, None] * count + torch.arange(count)) + _signed(seed * 0x9E3779B97F4A7C15)
    for multiplier, shift in ((1, 0), (0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
        if shift:
            x = (x ^ _shift_right(x, shift)) * _signed(multiplier)
        else:
            x = x * _signed(0x9E3779B97F4A7C15)
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).double() / 2.0**53


def _signed(number: int) -> int:
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def draw_backgrounds(u: Tensor, size: int, device: torch.device | str = "cpu") -> tuple[Tensor, list[str]]:
    """Backgrounds from uniform numbers [b, >= 12]: float32 [b, h, w, 3] in 0..255, and the words of captions for
    them."""
    kind = torch.searchsorted(torch.cumsum(KIND_SHARES, 0), u[:, 0].contiguous()).clamp(max=CHECKS)
    names = list(COLOURS)
    first = torch.where(kind == WHITE, 0, (u[:, 1] * len(names)).long())
    second = (first + 1 + (u[:, 2] * (len(names) - 1)).long()) % len(names)
    table = torch.tensor([COLOURS[name] for name in names], dtype=torch.float64)
    jitter = torch.where(kind == WHITE, 0.0, 1.0)[:, None] * (u[:, 3:6] - 0.5) * 32
    one = (table[first] + jitter).clamp(0, 255)
    other = torch.where((kind >= STRIPES)[:, None], 0.6 * one + 0.4 * table[second], table[second])

    axis = (torch.arange(size, dtype=torch.float32, device=device) + 0.5) / size
    yy, xx = axis[:, None], axis[None, :]  # h 1, 1 w
    angle, pitch = 2 * math.pi * u[:, 6], 3 + 7 * u[:, 7]
    across, down, pitch, kind_ = (
        v.to(device, torch.float32)[:, None, None] for v in (torch.cos(angle), torch.sin(angle), pitch, kind)
    )
    along = (xx - 0.5) * across + (yy - 0.5) * down  # b h w, about -0.7..0.7
    blend = torch.where(kind_ == GRADIENT, (along / 1.2 + 0.5).clamp(0, 1), 0.0)
    blend = torch.where(kind_ == STRIPES, ((along + 1) * pitch).floor() % 2, blend)
    blend = torch.where(kind_ == CHECKS, ((xx * pitch).floor() + (yy * pitch).floor()) % 2, blend)
    one, other = (v.to(device, torch.float32)[:, None, None, :] for v in (one, other))
    pictures = one + (other - one) * blend[..., None]

    columns = (column.tolist() for column in (first, second, kind, u[:, 8]))
    return pictures, [mention(names[a], names[z], k, chance) for a, z, k, chance in zip(*columns, strict=True)]


def mention(one: str, other: str, kind: int, chance: float) -> str:
    """The words for a background of a kind and two colours; empty if `chance` is too large."""
    if chance >= TOLD[kind]:
        return ""
    said = {GRADIENT: f"{one} and {other}", STRIPES: "striped", CHECKS: "checkered"}.get(kind, one)
    return f" on {'an' if said.startswith('orange') else 'a'} {said} background"


def compose(picture: Tensor, background: Tensor) -> Tensor:
    """uint8 RGBA [b, h, w, 4] over a background in 0..255 -> float32 RGB [b, h, w, 3] in -1..1."""
    colour, alpha = picture[..., :3].float(), picture[..., 3:].float() / 255
    return (background + (colour - background) * alpha) / 127.5 - 1


def background_words() -> Iterable[str]:
    """All words that backgrounds add to captions, for training a tokenizer."""
    return [f" on {'an' if n.startswith('orange') else 'a'} {n} background" for n in (*COLOURS, "striped", "checkered")]
