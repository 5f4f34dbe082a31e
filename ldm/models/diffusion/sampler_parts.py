"""Optional parts of samplers, besides the model and the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Draw = Callable[[], Tensor]  # N(0, 1) noise
Blend = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, int, Tensor, Tensor], Any]
Progress = Callable[[Iterable], Iterable]


def unchanged(x: Any, *_: Any) -> Any:
    """The part that does nothing."""
    return x


@dataclass(frozen=True)
class Parts:
    """blend(x, level) is called before the model, fix_x0(x0) after it, on_step(i, count, x, x0) after each step."""

    blend: Blend = unchanged
    fix_x0: Callable[[Tensor], Tensor] = unchanged
    on_step: OnStep = unchanged
    progress: Progress = iter  # around the steps


NONE = Parts()
