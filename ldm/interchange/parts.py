"""The change of one layer, of any kind; `kinds` has the kinds and what they do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The change of one layer.

    tensors: by LyCORIS's names, without alpha
    scale: factor of the change, alpha / rank as trained; rotations and whole differences have 1
    options: settings that are no tensors, see the functions of the rows
    """

    kind: str
    tensors: Mapping[str, Tensor]
    scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].detach().float()

    def vector(self, name: str, size: int) -> Tensor:
        """A tensor of so many numbers, flat, in fp32. Raises `ValueError` for another number of them."""
        value = self[name].flatten()
        if len(value) != size:
            raise ValueError(f"{name} has {len(value)} numbers; expected {size}")
        return value

    def get(self, name: str) -> Tensor | None:
        """A tensor in fp32, or None."""
        return self[name] if name in self.tensors else None
