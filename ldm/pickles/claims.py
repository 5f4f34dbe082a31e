"""Objects that a pickle makes besides plain values: claims about tensors, without memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

DIMENSIONS = 16
EXPANDED = 2**20  # bytes that a tensor may have beyond its storage, by strides of 0
SCALARS = (str, bytes, int, float, bool, type(None))


class Name(NamedTuple):
    """A name in a pickle; one of `BUILDERS`."""

    dotted: str


@dataclass(frozen=True, eq=False)
class Storage:
    """A storage of `elements` numbers in the file, or a view of `count` of them from `first` on."""

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
    """A future tensor: its place in its storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def overlaps(self) -> bool:
        """Whether two of its elements may share memory."""
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
    """The type of numpy numbers: its name and its byte order."""

    letter: str
    order: str = "<"


def as_key(value: Any) -> Any:
    """Check a key or a member of a set: it must be plain, and not one of the integers with colliding hashes."""
    if type(value) not in (*SCALARS, type) or type(value) is int and abs(value) >= 2**60:
        raise ValueError(f"a {type(value).__name__} as a key")
    return value


def only(value: Any, kind: type) -> Any:
    """Check that a value has exactly this type; a `Parameters` does not count as a dict."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value
