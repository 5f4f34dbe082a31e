"""The time limit of a part of a training, and the learning rate that follows from it."""

from __future__ import annotations

import time


class Clock:
    """A part that lasts `seconds` from its first step: a warm-up, a rate that stays, and a decay in its last share.

    A rate that stays serves when one training goes on over several calls: what is saved before the decay is where the
    next call goes on, and what the decay ends with is what this call is worth (arXiv 2404.06395, Sec. 4). `decay` is
    the share of the time in which the rate falls to 0, linearly; with 0 it never falls.
    """

    def __init__(self, seconds: float, decay: float, warm_up: int) -> None:
        self.seconds, self.decay, self.warm_up = seconds, decay, warm_up
        self.began: float | None = None

    def begin(self) -> None:
        """Start the clock after the first step, so that compilation does not count."""
        self.began = time.monotonic()

    @property
    def passed(self) -> float:
        """The share of the time that has passed, 0 .. 1."""
        return 0.0 if self.began is None else min(1.0, (time.monotonic() - self.began) / self.seconds)

    @property
    def decaying(self) -> bool:
        return self.decay > 0 and self.passed > 1 - self.decay

    @property
    def over(self) -> bool:
        return self.passed >= 1

    def rate(self, step: int) -> float:
        """The factor of the learning rate at `step`, counted from this call's first."""
        warm = min(1.0, (step + 1) / self.warm_up)
        return warm * ((1 - self.passed) / self.decay if self.decaying else 1.0)
