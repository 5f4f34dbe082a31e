"""Replaces the claims of a pickle by tensors, which use the mapped bytes of the file."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.pickles.claims import EXPANDED, SCALARS, Claim, Name, NumpyType, Storage

DEPTH, VALUES = 64, 4_000_000  # limits for the content besides tensors
SHARED = 8  # tensors may claim at most this multiple of the bytes of the file


@dataclass
class Assembly:
    """Replaces the claims in the result of the machine by tensors on the bytes of the file."""

    mapped: mmap.mmap
    places: Mapping[str, int]
    is_big: bool  # the most significant byte comes first
    source: str
    storages: dict[str, torch.UntypedStorage] = field(default_factory=dict)
    made: dict[int, tuple[Any, int] | None] = field(default_factory=dict)
    claimed: int = 0

    def finished(self, value: Any) -> Any:
        return self._finished(value, 0)[0]

    def _finished(self, value: Any, depth: int) -> tuple[Any, int]:
        """The finished value, and the number of values in it, with repeated values counted repeatedly."""
        if type(value) in (*SCALARS, torch.dtype, type, Counter):
            return value, 1
        if id(value) in self.made:
            if (known := self.made[id(value)]) is None:
                raise ValueError("a list or dict that contains itself")
            return known
        if depth > DEPTH:
            raise InputError(f"{self.source} refused: what it holds is nested more than {DEPTH} deep")
        self.made[id(value)] = None
        result = self._made_of(value, depth)
        if result[1] > VALUES:
            raise InputError(f"{self.source} refused: it unfolds to more than {VALUES} values")
        self.made[id(value)] = result
        return result

    def _made_of(self, value: Any, depth: int) -> tuple[Any, int]:
        match value:
            case Claim():
                return self._tensor(value), 1
            case Name() | Storage() | NumpyType():
                raise ValueError(f"a bare {type(value).__name__}")
            case dict():
                parts, count = self._all(value.values(), depth)
                return dict(zip(value, parts, strict=True)), count
            case list() | tuple():
                parts, count = self._all(value, depth)
                return type(value)(parts), count
            case set():
                return value, 1 + len(value)
        raise ValueError(f"a {type(value).__name__}")

    def _all(self, values: Iterable[Any], depth: int) -> tuple[list[Any], int]:
        parts = [self._finished(value, depth + 1) for value in values]
        return [part for part, _ in parts], 1 + sum(count for _, count in parts)

    def _tensor(self, claim: Claim) -> Tensor:
        self.claimed += claim.nbytes
        if self.claimed > SHARED * len(self.mapped) + EXPANDED:
            raise InputError(f"{self.source} refused: its tensors claim more than {SHARED} times the bytes of the file")
        dtype = claim.storage.dtype
        if not claim.nbytes:
            return torch.empty(claim.size, dtype=dtype)
        empty = torch.empty(0, dtype=dtype)
        tensor = empty.set_(self._storage(claim.storage), claim.offset, claim.size, claim.stride)
        return tensor.contiguous() if claim.overlaps() else tensor

    def _storage(self, storage: Storage) -> torch.UntypedStorage:
        if storage.key not in self.storages:
            place = self.places[storage.key]
            part = torch.frombuffer(self.mapped, dtype=torch.uint8, count=storage.nbytes, offset=place)
            is_aligned = place % storage.dtype.itemsize == 0
            untyped = part.untyped_storage() if is_aligned else part.clone().untyped_storage()
            if self.is_big:
                untyped = untyped.clone()
                untyped.byteswap(storage.dtype)
            self.storages[storage.key] = untyped
        return self.storages[storage.key]
