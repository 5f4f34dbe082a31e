"""What a pickle makes beside plain values: claims about tensors, which name no memory yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

DIMENSIONS = 16
EXPANDED = 2**20  # bytes that a tensor may have beyond its storage, by strides of 0
SCALARS = (str, bytes, int, float, bool, type(None))


class Name(NamedTuple):
    """A name that a pickle asked for; one of `BUILDERS`."""

    dotted: str


@dataclass(frozen=True, eq=False)
class Storage:
    """`elements` numbers in the file, of which a view has those from `first` on."""

    key: str
    dtype: torch.dtype
    elements: int
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Claim:
    """A tensor to be made: where it lies in its storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def overlaps(self) -> bool:
        """Whether two of its elements may be one number in memory."""
        reach = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size > 1:
                if stride < reach:
                    return True
                reach = stride * (size - 1) + reach
        return False


class Parameters(dict):
    """A `ParameterDict`: the mapping that it holds."""


@dataclass(eq=False)
class NumpyType:
    """The type of numpy numbers, of which only the name and the order of bytes mean anything."""

    letter: str
    order: str = "<"


def as_key(value: Any) -> Any:
    """A value that may be a key or in a set: plain, and no integer of those that all have the same hash."""
    if type(value) not in (*SCALARS, type) or type(value) is int and abs(value) >= 2**60:
        raise ValueError(f"a {type(value).__name__} as a key")
    return value


def only(value: Any, kind: type) -> Any:
    """The value, which must be of a kind; a `Parameters` is no dict to a pickle."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value
