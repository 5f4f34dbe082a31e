"""The draws of each batch, which depend only on the batch number and the rank, so a run can resume anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from ldm.errors import InputError


class ResumableBatches(Sampler[list[int]]):
    """A batch sampler of sample indices that never repeat: `DataLoader(dataset, batch_sampler=ResumableBatches(...))`.

    With B = `batch_size` and W = `world_size`, batch j (counted over the whole run) on rank r holds the draws
    jBW + rB ... jBW + rB + B - 1, so the ranks are disjoint and together leave no gap. An epoch is `batches_per_epoch`
    batches. The first pass starts at `start_batch`, which may lie within an epoch, and yields the rest of that epoch;
    each later pass yields the next epoch.

    `len()` is that of a full epoch: Lightning reads it once per run and itself counts the batches before a resume. It
    must not wrap this sampler (`use_distributed_sampler=False`). Save checkpoints in `on_train_batch_end`: if one is
    saved after the end of an epoch, Lightning miscounts the next epoch.

    Raises `InputError` unless the counts are positive, the start is not negative and the rank is below the world size.
    """

    def __init__(
        self, batch_size: int, start_batch: int = 0, batches_per_epoch: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        for name, value in (("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if batches_per_epoch < 1:
            raise InputError(
                f"an epoch has {batches_per_epoch} batches, expected at least 1: lower batch_size or raise repeats"
            )
        if start_batch < 0 or not 0 <= rank < world_size:
            raise InputError(
                f"expected start_batch >= 0 and 0 <= rank < world_size, got {start_batch}, rank {rank} of {world_size}"
            )
        self.batch_size, self.batches_per_epoch = batch_size, batches_per_epoch
        self.rank, self.world_size = rank, world_size
        self.next_batch = start_batch

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        start = self.next_batch
        end = (start // self.batches_per_epoch + 1) * self.batches_per_epoch
        for batch in range(start, end):
            if batch == end - 1:  # before the last yield: a reader that knows the length does not come back after it
                self.next_batch = end
            first = (batch * self.world_size + self.rank) * self.batch_size
            yield list(range(first, first + self.batch_size))


class SharedBatches(Sampler[list[int]]):
    """Batches of a dataset in order, from beginning to end; each process takes its part of each batch.

    With B = `batch_size` and W = `world_size`, whole batch k holds the items kBW ... kBW + BW - 1, fewer at the end. A
    process whose part would be empty takes the first item, so that all processes have equally many batches.
    """

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.batch_size, self.rank, self.world_size = length, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.length // (self.batch_size * self.world_size))

    def rows(self, batch: int) -> tuple[int, int]:
        """(the first row of this process, the rows of all) of a whole batch."""
        size = self.batch_size * self.world_size
        whole = min(size, self.length - batch * size)
        first, last = (whole * rank // self.world_size for rank in (self.rank, self.rank + 1))
        return (first if last > first else 0), whole

    def __iter__(self) -> Iterator[list[int]]:
        size = self.batch_size * self.world_size
        for batch in range(len(self)):
            first, whole = self.rows(batch)
            count = max(1, whole * (self.rank + 1) // self.world_size - whole * self.rank // self.world_size)
            yield list(range(batch * size + first, batch * size + first + count))


class EndlessSamples(Dataset):
    """Makes a finite dataset endless: sample k shows the item at place `k % len` of epoch `k // len`.

    Each epoch has its own order, which depends on `seed` and its number.
    """

    def __init__(self, dataset: Dataset, seed: int = 0) -> None:
        self.dataset, self.seed = dataset, seed
        self._order: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, k: int) -> Any:
        epoch, place = divmod(k, len(self))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.seed << 24) + epoch)
            self._order = epoch, torch.randperm(len(self), generator=generator)
        return self.dataset[int(self._order[1][place])]


def as_samples(dataset: Dataset, seed: int = 0) -> Dataset:
    """A dataset with `sample(k)` for any sample index: itself, or wrapped in `EndlessSamples`."""
    return dataset if hasattr(dataset, "sample") else EndlessSamples(dataset, seed)
