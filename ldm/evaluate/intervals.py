"""Means with bootstrap intervals for pictures that are grouped by prompt; prompts and pictures are samples.

Two-stage bootstrap (Davison and Hinkley, Bootstrap Methods and their Application, 1997, Sec. 3.8): prompts are
resampled with replacement, then the pictures (seeds) of each. The interval lies between percentiles of the resampled
means. With one prompt only pictures are resampled, with one picture per prompt only prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """The mean of `n` values (pictures or pairs) and the ends of its interval, which are None if n is 1."""

    mean: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} " + ("(one value)" if self.low is None else f"[{self.low:.3f}, {self.high:.3f}]")


def bootstrap_weights(groups: Sequence[object], draws: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each resample contains each picture, [draws, n]. groups: the prompt of each picture, [n]."""
    random = np.random.default_rng(seed)
    _, number = np.unique(np.asarray([str(group) for group in groups]), return_inverse=True)
    members = [np.flatnonzero(number == group) for group in range(number.max() + 1)]
    weights = np.zeros((draws, len(number)))
    prompts = random.multinomial(len(members), [1 / len(members)] * len(members), size=draws)  # how often each is drawn
    for group, own in enumerate(members):
        n = len(own)
        weights[:, own] = random.multinomial(prompts[:, group] * n, [1 / n] * n)
    return weights


def mean_interval(
    values: np.ndarray, groups: Sequence[object], level: float = 0.95, draws: int = 2000, seed: int = 0
) -> Interval:
    """The mean of values, one of each picture [n] or one of each pair [n, n], with its interval.

    Only pairs of pictures of the same prompt count. A picture that is drawn twice makes no pair with itself. Raises
    `ValueError` if there are no values.
    """
    values = np.asarray(values, dtype=np.float64)
    weights = bootstrap_weights(groups, draws, seed)
    if values.ndim == 1:
        used, mean = len(values), values.mean()
        totals, counts = weights @ values, weights.sum(1)
    else:
        names = np.asarray([str(group) for group in groups])
        pairs = (names[:, None] == names[None]) & ~np.eye(len(names), dtype=bool)
        used = int(pairs.sum()) // 2
        if not used:
            raise ValueError("no prompt has two pictures, so that there are no pairs")
        mean = values[pairs].mean()
        totals = ((weights @ np.where(pairs, values, 0)) * weights).sum(1)
        counts = ((weights @ pairs) * weights).sum(1)
    if used < 2:
        return Interval(float(mean), None, None, used)
    resampled = totals[counts > 0] / counts[counts > 0]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean), float(low), float(high), used)
