"""Sums of whole checkpoints, tensor by tensor: weighted sums, and a model plus the difference of two others.

Both are a linear combination: A + m (B - C) has the factors 1, m and -m. Files are mapped into memory and the result is
streamed, so that no model lies in memory as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ldm import streamed
from ldm.checkpoints import is_finite, read_weights
from ldm.errors import InputError
from ldm.models import bases

INPUT = "input_blocks.0.0.weight"  # wider in inpainting models, whose further channels are the mask and the picture


class Source(NamedTuple):
    """A checkpoint and its factor."""

    path: str
    weights: Mapping[str, Tensor]
    factor: float


def opened(paths: Sequence[str | Path], factors: Sequence[float]) -> list[Source]:
    """Checkpoints with their factors, mapped into memory. Raises `InputError` for folders and what is no model."""
    sources = []
    for path, factor in zip(paths, factors, strict=True):
        if not math.isfinite(factor):
            raise InputError(f"expected finite weights, got {factor}")
        if Path(path).is_dir():
            raise InputError(f"{path} is a folder; expected a checkpoint: ldm convert {path} OUT --to checkpoint")
        weights = read_weights(path)
        if not bases.holds_unet(weights):
            raise InputError(f"{path} holds no UNet; expected the checkpoint of a whole model")
        sources.append(Source(str(path), weights, factor))
    return sources


def mixed(sources: Sequence[Source], name: str) -> Tensor:
    """The sum for one tensor of the first model, in fp32.

    Whole numbers are the first model's. If the first is an inpainting model, the others add to the channels that they
    have.
    Raises `InputError` for other shapes, and for a result that is not finite.
    """
    first = sources[0].weights[name]
    if not first.is_floating_point():
        return first
    total = first.float() * sources[0].factor
    for path, weights, factor in sources[1:]:
        other = weights[name]
        if other.shape == first.shape:
            total += factor * other.float()
        elif name.endswith(INPUT) and other.shape[0] == first.shape[0] and other.shape[1] < first.shape[1]:
            total[:, : other.shape[1]] += factor * other.float()
        else:
            raise InputError(
                f"{path} is another model than {sources[0].path}: {name} has {list(other.shape)} and "
                f"{list(first.shape)}"
            )
    if not is_finite(total):
        paths = ", ".join(source.path for source in sources)
        raise InputError(f"the sum of {name} is not finite; get undamaged copies of {paths}")
    return total


def write(
    path: Path,
    sources: Sequence[Source],
    dtype: torch.dtype | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[str]:
    """Write the sum of models, in the types of the first or in one type. Returns the names that not all of them have.

    Those are as in the first model.
    """
    first = sources[0].weights
    alone = [name for name in first if any(name not in source.weights for source in sources[1:])]
    kept = set(alone)

    def kind(value: Tensor) -> torch.dtype:
        return dtype if dtype is not None and value.is_floating_point() else value.dtype

    described = {name: (kind(value), tuple(value.shape)) for name, value in first.items()}
    streamed.write(
        path, described, lambda name: first[name] if name in kept else mixed(sources, name),
        {"format": "pt"}, progress,
    )  # fmt: skip
    return alone
