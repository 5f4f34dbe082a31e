"""FID and KID between two sets of pictures, by torchmetrics, from vectors of a given network.

FID: Heusel et al., arXiv 1706.08500, Eq. 6. KID: Binkowski et al., arXiv 1801.01401, Sec. 4. Both were defined with
Inception's features; values of different networks cannot be compared.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from torch import Tensor, nn

from ldm.devices import forked_rng
from ldm.errors import InputError


@dataclass(frozen=True)
class Distances:
    """FID, and KID as the mean and standard deviation over random subsets of `subset_size` pictures each."""

    fid: float
    kid: float
    kid_std: float
    subset_size: int
    samples: int
    references: int


class Given(nn.Module):
    """A feature extractor for torchmetrics' metrics that passes given vectors through."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, vectors: Tensor) -> Tensor:
        return vectors


def distances(
    samples: Tensor, references: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Distances:
    """The distances between vectors [n, d] and [m, d]. A subset has at most one vector less than the smaller set.

    With fewer pictures than dimensions, FID depends mostly on their number; KID is unbiased for any number.
    Raises `InputError` if a set has fewer than four pictures.
    """
    if min(len(samples), len(references)) < 4:
        raise InputError(f"FID and KID need at least 4 pictures of each kind, got {len(samples)} and {len(references)}")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(subset_size, min(len(samples), len(references)) - 1)
    given = Given(samples.shape[1])
    with forked_rng(seed=seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # KID warns that it keeps all vectors
        fid = FrechetInceptionDistance(feature=given)
        kid = KernelInceptionDistance(feature=given, subsets=subsets, subset_size=size)
        for metric in (fid, kid):
            metric.update(references.double(), real=True)
            metric.update(samples.double(), real=False)
        mean, std = kid.compute()
        found = fid.compute().item()
    return Distances(found, mean.item(), std.item(), size, len(samples), len(references))
