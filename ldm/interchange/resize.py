"""Ranks of LoRAs: singular values of a change, criteria for how many to keep, and factors of that many.

The criteria are those of kohya's resize_lora.py, by its names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.interchange.lora import Factors, Lora, shaped

OVERSAMPLED = 32  # vectors beside those that are wanted
SMALLEST = 1e-6  # a largest singular value below it is no change at all


def _ratio(values: Tensor, target: float) -> int:
    """All that are larger than the largest divided by the target."""
    return int((values > values[0] / target).sum())


def _cumulative(values: Tensor, target: float) -> int:
    """The fewest whose sum is at least this share of the sum."""
    return int(torch.searchsorted(values.cumsum(0) / values.sum(), target)) + 1


def _frobenius(values: Tensor, target: float) -> int:
    """The fewest whose Frobenius norm is at least this share of the norm."""
    return int(torch.searchsorted(values.square().cumsum(0) / values.square().sum(), target**2)) + 1


CRITERIA: dict[str, Callable[[Tensor, float], int]] = {
    "sv_ratio": _ratio,
    "sv_fro": _frobenius,
    "sv_cumulative": _cumulative,
}


@dataclass(frozen=True)
class Cut:
    """How many singular values to keep: at most `rank` (of kernels above 1 x 1 `conv_rank`), fewer by a criterion.

    Raises `InputError` for ranks below 1, an unknown criterion, or a target that it does not take: a ratio of at least
    1, or a share above 0 and up to 1.
    """

    rank: int | None = None
    conv_rank: int | None = None
    criterion: str | None = None
    target: float = 1.0

    def __post_init__(self) -> None:
        for rank in (self.rank, self.conv_rank):
            if rank is not None and rank < 1:
                raise InputError(f"expected a rank of at least 1, got {rank}")
        if self.criterion is None:
            return
        if self.criterion not in CRITERIA:
            raise InputError(f"expected {', '.join(CRITERIA)}, got {self.criterion!r}")
        fits = self.target >= 1 if self.criterion == "sv_ratio" else 0 < self.target <= 1
        if not fits:
            expected = "a number of at least 1" if self.criterion == "sv_ratio" else "a share above 0, up to 1"
            raise InputError(f"{self.criterion}: expected {expected}, got {self.target:g}")

    def __bool__(self) -> bool:
        return self != Cut()

    def of(self, values: Tensor, kernel: int = 1) -> int:
        """The rank for singular values in descending order, of a kernel of so many places."""
        own = len(values)
        if self.criterion:
            own = CRITERIA[self.criterion](values, self.target) if values[0] > SMALLEST else 1
        most = self.conv_rank if kernel > 1 and self.conv_rank is not None else self.rank
        return max(1, min(own, len(values), most or len(values)))


class Decomposed(NamedTuple):
    """u [out, n], s [n] in descending order, vh [n, in * places]."""

    u: Tensor
    s: Tensor
    vh: Tensor


def of_factors(factors: Factors) -> Decomposed:
    """The singular value decomposition of up @ down without forming it: up @ down = Q_u (R_u R_d^T) Q_d^T."""
    q_up, r_up = torch.linalg.qr(factors.up.float().flatten(1))
    q_down, r_down = torch.linalg.qr(factors.down.float().flatten(1).T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    return Decomposed(q_up @ u, s, vh @ q_down.T)


def of_change(change: Tensor) -> Decomposed:
    """The decomposition of a whole change, by the eigenvectors of its smaller Gram matrix in fp64.

    For A [m, n] with m <= n, A A^T = U S^2 U^T. Values are exact to some 1e-8 of the largest, which is below what fp32
    holds; those below 1e-7 of it become 0, with their vectors.
    """
    matrix = change.flatten(1)
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()  # Apple's GPUs have no fp64
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.T
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    values = squares.flip(0).clamp(min=0).sqrt()
    values = values.where(values > 1e-7 * values[0], 0)
    vectors = vectors.flip(1) * (values > 0)
    others = (vectors.T @ matrix) / values.where(values > 0, 1)[:, None]
    u, vh = (vectors, others) if wide else (others.T, vectors.T)
    return Decomposed(u.float(), values.float(), vh.float())


def leading(change: Tensor, most: int) -> Decomposed:
    """The same for the `most` largest values and some more, in a third of the time; all values, fewer vectors.

    The eigenvectors of the Gram matrix in fp32 begin a subspace, which one step of subspace iteration with the change
    itself (Halko et al., arXiv 0909.4061, algorithm 4.4) frees from the squared rounding errors. Within it the
    decomposition is exact: what a cut leaves out is larger than the least possible by less than 1e-5 of it, or of the
    change's norm times 1e-6 (tested on flat spectra and on those that fall by four orders).
    """
    matrix = change.flatten(1).float()
    wide = matrix.shape[0] <= matrix.shape[1]
    matrix = matrix if wide else matrix.T
    count = most + OVERSAMPLED
    if count >= matrix.shape[0]:
        return of_change(change)
    squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
    begun = vectors[:, -count:]
    basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ begun)[0])[0]
    inner = of_change(basis.T @ matrix)  # [count, n]
    rest = squares.flip(0)[count:].clamp(min=0).sqrt()
    u, vh = basis @ inner.u, inner.vh
    return Decomposed(*((u, torch.cat([inner.s, rest]), vh) if wide else (vh.T, torch.cat([inner.s, rest]), u.T)))


def cut(parts: Decomposed, rank: int, weight: Iterable[int], scale: float = 1.0) -> Factors:
    """The factors of a rank for a weight of a shape; up includes the singular values."""
    return shaped(parts.vh[:rank], parts.u[:, :rank] * parts.s[:rank], tuple(weight), scale)


class Resized(NamedTuple):
    """The factors, and the share of the Frobenius norm that they keep."""

    factors: Factors
    share: float


def resized(factors: Factors, how: Cut) -> Resized:
    """The best factors of the rank that `how` chooses (Eckart-Young)."""
    parts = of_factors(factors)
    rank = how.of(parts.s, factors.down[0, 0].numel())
    total = parts.s.square().sum().item()
    share = (parts.s[:rank].square().sum().item() / total) ** 0.5 if total else 1.0
    return Resized(cut(parts, rank, (len(factors.up), *factors.down.shape[1:]), factors.scale), share)


def resized_lora(
    lora: Lora, how: Cut, progress: Callable[[Iterable], Iterable] = iter
) -> tuple[Lora, dict[str, float]]:
    """A LoRA of lower ranks, and the share of its Frobenius norm that each layer keeps."""
    layers, shares = {}, {}
    for name, factors in progress(list(lora.layers.items())):
        layers[name], shares[name] = resized(factors, how)
    return Lora(layers, lora.tokens), shares
