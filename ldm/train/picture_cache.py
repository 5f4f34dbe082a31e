"""The encodings of a set's pictures: in memory, or in a file that is written row by row and read by mapping it.

So a hundred thousand pictures need no more memory than three, if their encodings are kept in a folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ldm.checkpoints import atomic_write, fingerprint, read_weights, refuse_not_finite
from ldm.data.dreambooth import PersonalizedBase
from ldm.errors import InputError, short
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

log = logging.getLogger(__name__)

ADVICE = "use an autoencoder that does not overflow in half precision, or --precision 32"
KINDS = {torch.float32: ("F32", "<f4"), torch.float16: ("F16", "<f2"), torch.bfloat16: ("BF16", "<i2")}


class Layout:
    """Where the encodings of a dataset's pictures are: in one tensor for each of their shapes.

    factor: pixels per latent.
    """

    def __init__(self, dataset: PersonalizedBase, factor: int) -> None:
        shapes = [tuple(side // factor for side in dataset.shape_of(number)) for number in range(len(dataset.paths))]
        several = len(set(shapes)) > 1
        self.counts: dict[str, int] = {}
        self.sides: dict[str, tuple[int, ...]] = {}
        self.places: list[tuple[str, int]] = []  # for each picture the name of its tensor, and the row
        for shape in shapes:
            name = f"moments-{shape[0]}x{shape[1]}" if several else "moments"
            self.places.append((name, self.counts.get(name, 0)))
            self.counts[name], self.sides[name] = self.counts.get(name, 0) + 1, shape

    def shapes(self, channels: int) -> dict[str, tuple[int, ...]]:
        """The shape [n, 2, 2c, h, w] of each tensor."""
        return {name: (count, 2, channels, *self.sides[name]) for name, count in self.counts.items()}

    def joined(self, tensors: Mapping[str, Tensor]) -> Tensor | ByShape:
        return tensors["moments"] if "moments" in tensors else ByShape(tensors, self.places)


class ByShape:
    """Posteriors' parameters of pictures of several shapes: `kept[number]` is [2, 2c, h, w]."""

    def __init__(self, tensors: Mapping[str, Tensor], places: list[tuple[str, int]]) -> None:
        self.tensors, self.places = tensors, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Tensor:
        name, row = self.places[number]
        return self.tensors[name][row]


@torch.no_grad()
def pictures(
    model: Any, dataset: PersonalizedBase, folder: Path | None, device: torch.device, name: str, workers: int = 0
) -> Tensor | ByShape:
    """The posteriors' parameters [pictures][2, 2c, h, w] of a dataset; read from `folder` if they are there and fit.

    The second index is 1 for flipped pictures. One tensor if all pictures have one shape. `workers`: the number of
    processes that read pictures (0: this one), which changes no number.
    """
    first_stage = model.first_stage_model
    layout = Layout(dataset, first_stage.downsampling_factor)
    file = folder / f"pictures-{_key(first_stage, dataset)}.safetensors" if folder else None
    if file is not None and file.is_file():
        try:
            return layout.joined(_fitting(read_weights(file), first_stage, layout))
        except InputError as error:
            log.warning("%s is rebuilt: %s", file, error)
    elif folder is not None and any(folder.glob("pictures-*.safetensors")):
        log.info("%s holds encodings of other pictures or of another autoencoder; new ones are added", folder)
    first_stage.to(device).eval()
    encoded = _encoded(first_stage, dataset, device, name, workers)
    first = next(encoded)
    with _room(file, layout.shapes(first.shape[1]), first.dtype) as tensors:
        for (tensor, row), moments in zip(layout.places, itertools.chain([first], encoded), strict=True):
            tensors[tensor][row] = moments
    return layout.joined(tensors if file is None else read_weights(file))


class Read(Dataset):
    """Each picture of a dataset [2, 3, H, W], as it is and flipped."""

    def __init__(self, dataset: PersonalizedBase) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.paths)

    def __getitem__(self, number: int) -> Tensor:
        return torch.stack([self.dataset.picture(number, flipped).permute(2, 0, 1) for flipped in (False, True)])


def _encoded(
    first_stage: nn.Module, dataset: PersonalizedBase, device: torch.device, name: str, workers: int
) -> Iterator[Tensor]:
    """For each picture [2, 2c, h, w]: as it is, and flipped."""
    own = torch.Generator()  # a loader draws a seed, which must not be the run's
    loader = DataLoader(Read(dataset), batch_size=None, num_workers=min(workers, len(dataset.paths)), generator=own)
    for number, both in enumerate(tqdm(loader, desc=f"encoding pictures ({name})")):
        encoded = [first_stage.encode(picture[None].to(device)) for picture in both]
        if not isinstance(encoded[0], DiagonalGaussianDistribution):
            raise InputError(f"{type(first_stage).__name__} has no posterior to keep: train with --cache off")
        moments = torch.cat([posterior.parameters.cpu() for posterior in encoded])
        if not torch.isfinite(moments).all():
            raise InputError(f"the first stage gives numbers that are not finite for {dataset.paths[number]}: {ADVICE}")
        yield moments


@contextmanager
def _room(path: Path | None, layout: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Tensors of these shapes to fill: in memory, or without a `path`, mapped from a safetensors file.

    The file is put at `path` when the block succeeds.
    """
    if path is None:
        yield {name: torch.empty(shape, dtype=dtype) for name, shape in layout.items()}
        return
    kind, number = KINDS[dtype]
    header, end = {}, 0
    for name, shape in layout.items():
        begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    with atomic_write(path) as beside:
        with beside.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        maps = {
            name: np.memmap(beside, number, "r+", 8 + len(text) + one["data_offsets"][0], tuple(one["shape"]))
            for name, one in header.items()
        }
        yield {name: torch.from_numpy(values).view(dtype) for name, values in maps.items()}
        for values in maps.values():
            values.flush()


def _fitting(kept: dict[str, Tensor], first_stage: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The posteriors of a cache. Raises `InputError` if they do not fit these pictures."""
    kind = next(first_stage.parameters()).dtype
    channels = next((value.shape[2] for value in kept.values() if value.dim() == 5), 0)
    wanted = layout.shapes(channels)
    fits = channels and channels % 2 == 0 and kept.keys() == wanted.keys()
    if not fits or any(kept[name].shape != shape or kept[name].dtype != kind for name, shape in wanted.items()):
        found = {name: [str(value.dtype), *value.shape] for name, value in kept.items()}
        sides = ", ".join(f"{height} x {width}" for height, width in layout.sides.values())
        raise InputError(f"it holds {short(found)}, expected moments of {len(layout.places)} pictures, {sides}, {kind}")
    refuse_not_finite(kept, "it")
    return kept


def _key(first_stage: nn.Module, dataset: PersonalizedBase) -> str:
    """A digest of everything that the encodings depend on: the pictures' bytes, their shapes, the autoencoder."""
    digest = hashlib.sha256(fingerprint(first_stage.state_dict()).encode())
    shapes = [dataset.shape_of(number) for number in range(len(dataset.paths))]
    digest.update(json.dumps([shapes, dataset.interpolation, dataset.crops]).encode())
    for path in dataset.paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:24]
