"""The random numbers of training steps, which do not depend on the number of processes and accumulated batches.

A step of W processes and A accumulated batches of b pictures each equals the step of one process on W * A * b pictures:
each process draws the numbers of the whole step from the same stream and takes the rows of its own pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ldm.devices import forked_rng

Rows = Callable[[int], tuple[int, int]]  # pictures in a batch -> (first row, rows of the whole step)


class Draws:
    """Random numbers for the pictures of a batch, from torch's generators."""

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
    """Random numbers for a batch that is a part of a whole step.

    The numbers of the whole step are kept for its other batches, until `begin` starts a new step.
    """

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.rows: Rows = lambda pictures: (0, pictures)
        self.next = 0

    def begin(self, rows: Rows, is_first: bool = True) -> None:
        """The next numbers are for the batch at these rows. `is_first`: it is the first batch of a step."""
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
        if self.kept[number].shape != (whole, *shape[1:]):  # batches of another size cannot share the numbers
            self.kept[number] = draw((whole, *shape[1:]))
        return self.kept[number][first : first + shape[0]]


def rows_of_step(rank: int, processes: int, place: int, batches: int) -> Rows:
    """The rows of accumulated batch number `place` on process `rank`, in the order of `ResumableBatches`."""
    return lambda pictures: ((place * processes + rank) * pictures, processes * batches * pictures)


class Stream:
    """A stream of random numbers besides that of the process: for one of several trainings, or for all processes.

    On each type of device, they equal the numbers of a process that is seeded with `seed`.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.states: dict[str, Tensor] = {}  # of the generators, by the type of their device
        self.draws = SharedDraws()

    @contextmanager
    def drawing_from(self, device: torch.device) -> Iterator[None]:
        """Within this context, the generators of the CPU and of `device` have the states of this stream."""
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
