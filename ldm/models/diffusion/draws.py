"""The random numbers of training steps: the same for a step's pictures, however many processes and batches share them.

A step of W processes and A accumulated batches of b pictures each is the step of one process on W * A * b pictures:
each draws the numbers of the whole step from one stream and takes the rows of its own pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ldm.devices import forked_rng

Rows = Callable[[int], tuple[int, int]]  # how many pictures a batch has -> (its first row, rows of the whole)


class Draws:
    """Numbers for the pictures of a batch, from the generators of torch."""

    def normal(self, shape: torch.Size) -> Tensor:
        """Normal numbers of this shape, [b, ...], on the CPU."""
        return torch.randn(shape)

    def normal_like(self, x: Tensor) -> Tensor:
        """Normal numbers in the shape of x [b, ...], on its device."""
        return torch.randn_like(x)

    def steps(self, count: int, pictures: int, device: torch.device) -> Tensor:
        """Time steps [b] below `count`."""
        return torch.randint(0, count, (pictures,), device=device)


class SharedDraws(Draws):
    """Numbers for a batch that is a part of a whole one.

    What was drawn is kept until `begin` says that another whole one begins: its further batches take their rows of it.
    """

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.rows: Rows = lambda pictures: (0, pictures)
        self.next = 0

    def begin(self, rows: Rows, is_first: bool = True) -> None:
        """What follows is for the batch at these rows; `is_first`: of a whole one for which nothing is drawn yet."""
        self.rows, self.next = rows, 0
        if is_first:
            self.kept = []

    def normal(self, shape: torch.Size) -> Tensor:
        return self._of_all(torch.randn, tuple(shape))

    def normal_like(self, x: Tensor) -> Tensor:
        return self._of_all(partial(torch.randn, dtype=x.dtype, device=x.device), tuple(x.shape))

    def steps(self, count: int, pictures: int, device: torch.device) -> Tensor:
        return self._of_all(partial(torch.randint, 0, count, device=device), (pictures,))

    def _of_all(self, draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...]) -> Tensor:
        first, whole = self.rows(shape[0])
        number, self.next = self.next, self.next + 1
        if number == len(self.kept):
            self.kept.append(draw((whole, *shape[1:])))
        if self.kept[number].shape != (whole, *shape[1:]):  # batches of other sizes share nothing
            self.kept[number] = draw((whole, *shape[1:]))
        return self.kept[number][first : first + shape[0]]


def rows_of_step(rank: int, processes: int, place: int, batches: int) -> Rows:
    """The rows of accumulated batch number `place` on process `rank`, in the order of `ResumableBatches`."""
    return lambda pictures: ((place * processes + rank) * pictures, processes * batches * pictures)


class Stream:
    """Random numbers beside those of the process: of one training among several, or of all processes together.

    They are those that a process seeded with `seed` has, on each kind of device.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.states: dict[str, Tensor] = {}  # of the generators, by the type of their device
        self.draws = SharedDraws()

    @contextmanager
    def drawing_from(self, device: torch.device) -> Iterator[None]:
        """Within this context the generators of the CPU and, if it is another, of `device` are those of this stream."""
        generators = [torch.default_generator]
        if device.type == "cuda":
            generators.append(torch.cuda.default_generators[device.index or 0])
        if device.type == "mps":
            generators.append(torch.mps._get_default_mps_generator())
        with forked_rng(device):
            for generator in generators:
                kind = generator.device.type
                if kind in self.states:
                    generator.set_state(self.states[kind])
                else:
                    generator.manual_seed(self.seed)
            yield
            self.states = {generator.device.type: generator.get_state() for generator in generators}
