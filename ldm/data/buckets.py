"""Aspect-ratio buckets: pictures of many shapes, of which each batch has one (NovelAI, "Aspect Ratio Bucketing", 2022).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm import schema
from ldm.errors import InputError

Shape = tuple[int, int]  # height, width in pixels


class Buckets:
    """The shapes that pictures are resized to: about `size` squared pixels, sides that are multiples of `step`.

    settings: true for the defaults, or a mapping of `ldm.schema.Buckets`. Raises `InputError`.
    """

    def __init__(self, size: int, settings: bool | Mapping[str, Any]) -> None:
        given = {} if settings is True else settings
        schema.check_part(schema.Buckets, given, "buckets")
        chosen = schema.Buckets(**given)
        self.size, self.upscale = size, chosen.upscale
        self.step = chosen.step or min(64, max(1, size // 4))
        self.least, self.most = chosen.min or size // 2, chosen.max or 2 * size
        if size % self.step or not self.step <= self.least <= size <= self.most:
            raise InputError(
                f"buckets: expected step <= min <= size <= max and a size that is a multiple of step, got step "
                f"{self.step}, min {self.least}, size {size}, max {self.most}"
            )
        self.shapes = self._all()

    def _all(self) -> list[Shape]:
        """For each height the largest width that keeps the number of pixels, and the same turned."""
        found = set()
        for side in range(-(-self.least // self.step) * self.step, self.most + 1, self.step):
            other = min(self.most, self.size**2 // side) // self.step * self.step
            if other >= self.least:
                found |= {(side, other), (other, side)}
        return sorted(found)

    def shape_of(self, height: int, width: int, name: str) -> Shape:
        """The bucket of a picture: the one of the nearest aspect ratio. `name` is for errors.

        Without `upscale`, a picture with fewer pixels keeps its size, cut to multiples of `step`. Raises `InputError`
        if that leaves nothing.
        """
        if self.upscale or height * width > self.size**2:
            ratio = math.log(height / width)
            return min(self.shapes, key=lambda one: (abs(math.log(one[0] / one[1]) - ratio), -one[0] * one[1]))
        cut = tuple(min(side, self.most) // self.step * self.step for side in (height, width))
        if min(cut) < self.step:
            raise InputError(
                f"{name} has {width} x {height} pixels, less than one step of {self.step}: remove it, or set "
                "buckets.upscale: true"
            )
        return cut


def told(shapes: Sequence[Shape]) -> str:
    """How many pictures each bucket has, the fullest first: `64 x 96: 12, 96 x 64: 3` (width x height)."""
    counts = sorted(Counter(shapes).items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{width} x {height}: {count}" for (height, width), count in counts[:8])
    return listed + (f", and {len(counts) - 8} more" if len(counts) > 8 else "")


class GroupedOrder:
    """Orders of an epoch in which each `group` of places has pictures of one shape.

    Picture n comes `repeats[n]` times. A shape whose pictures do not fill its last group shows some of them once more,
    other ones in each epoch.
    """

    def __init__(self, shapes: Sequence[Shape], repeats: Sequence[int], group: int = 1) -> None:
        self.group = group
        numbers: dict[Shape, list[int]] = {}
        for number, shape in enumerate(shapes):
            numbers.setdefault(shape, []).append(number)
        times = torch.as_tensor(repeats)
        self.rows = [
            torch.repeat_interleave(torch.tensor(own), times[own]) for _, own in sorted(numbers.items())
        ]  # for each shape, the numbers of its pictures, repeated
        self.length = sum(self._filled(len(row)) for row in self.rows)

    def _filled(self, count: int) -> int:
        return -(-count // self.group) * self.group

    def order(self, generator: torch.Generator | None) -> Tensor:
        """The numbers of the pictures of one epoch, [length]; without a generator in their own order."""
        groups = []
        for row in self.rows:
            missing = self._filled(len(row)) - len(row)
            shuffled = row if generator is None else row[torch.randperm(len(row), generator=generator)]
            more = row if generator is None else row[torch.randperm(len(row), generator=generator)]
            more = more.repeat(-(-missing // len(row)))[:missing]
            groups.append(torch.cat([shuffled, more]).view(-1, self.group))
        together = torch.cat(groups)
        if generator is not None:
            together = together[torch.randperm(len(together), generator=generator)]
        return together.flatten()
