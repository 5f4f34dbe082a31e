"""LDM's learning-rate schedules: factors for `torch.optim.lr_scheduler.LambdaLR`, as functions of the step."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.errors import InputError

log = logging.getLogger(__name__)


def ramp(n: int, steps: int, start: float, end: float) -> float:
    """From `start` to `end` in a straight line of `steps` steps."""
    return start + (end - start) * n / steps


def half_cosine(fraction: float, start: float, end: float) -> float:
    """From `start` to `end` on half a cosine; SGDR (arXiv 1608.03983) Eq. 5."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * fraction))


class LambdaWarmUpCosineScheduler:
    """A linear warm-up from lr_start to lr_max, half a cosine down to lr_min at `max_decay_steps`, then lr_min.

    Use with a base learning rate of 1.0, or read the values as factors. Raises `InputError` if the decay would end
    before the warm-up.
    """

    def __init__(
        self,
        warm_up_steps: int,
        lr_min: float,
        lr_max: float,
        lr_start: float,
        max_decay_steps: int,
        verbosity_interval: int = 0,
    ):
        if max_decay_steps <= warm_up_steps:
            raise InputError(f"max_decay_steps {max_decay_steps} must be larger than warm_up_steps {warm_up_steps}")
        self.warm_up_steps, self.max_decay_steps = warm_up_steps, max_decay_steps
        self.lr_min, self.lr_max, self.lr_start = lr_min, lr_max, lr_start
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int) -> float:
        """The factor at step n."""
        if n < self.warm_up_steps:
            factor = ramp(n, self.warm_up_steps, self.lr_start, self.lr_max)
        else:
            fraction = (n - self.warm_up_steps) / (self.max_decay_steps - self.warm_up_steps)
            factor = half_cosine(min(fraction, 1.0), self.lr_max, self.lr_min)
        return _told(self, n, factor)

    def __call__(self, n: int) -> float:
        return self.schedule(n)


class LambdaWarmUpCosineScheduler2:
    """Cycles, each with a linear warm-up from f_start to f_max and half a cosine down to f_min.

    One entry per cycle in every list. After the last cycle its f_min is held.
    Raises `InputError` for lists of different lengths.
    """

    def __init__(
        self,
        warm_up_steps: Sequence[int],
        f_min: Sequence[float],
        f_max: Sequence[float],
        f_start: Sequence[float],
        cycle_lengths: Sequence[int],
        verbosity_interval: int = 0,
    ):
        lists = dict(
            warm_up_steps=warm_up_steps, f_min=f_min, f_max=f_max, f_start=f_start, cycle_lengths=cycle_lengths
        )
        lengths = {name: len(values) for name, values in lists.items()}
        if len(set(lengths.values())) != 1 or not cycle_lengths:
            raise InputError(f"a learning-rate schedule needs one value per cycle in each of its lists, got {lengths}")
        self.cycles = list(zip(cycle_lengths, warm_up_steps, f_start, f_max, f_min, strict=True))
        self.verbosity_interval = verbosity_interval

    def schedule(self, n: int) -> float:
        """The factor at step n."""
        return _told(self, n, self._factor(n))

    def _factor(self, n: int) -> float:
        for length, warm_up, start, top, bottom in self.cycles:
            if n <= length:
                return ramp(n, warm_up, start, top) if n < warm_up else self.decay(n, length, warm_up, top, bottom)
            n -= length
        return bottom

    def decay(self, n: int, length: int, warm_up: int, top: float, bottom: float) -> float:
        """The factor after the warm-up of one cycle."""
        return half_cosine((n - warm_up) / max(length - warm_up, 1), top, bottom)

    def __call__(self, n: int) -> float:
        return self.schedule(n)


class LambdaLinearScheduler(LambdaWarmUpCosineScheduler2):
    """The same cycles with a linear decay. As published, the line starts at f_max at step 0 of the cycle, so the factor
    jumps from f_max to a lower value at the end of the warm-up.
    """

    def decay(self, n: int, length: int, warm_up: int, top: float, bottom: float) -> float:
        return ramp(n, length, top, bottom)


class NamedSchedule:
    """A linear warm-up from 0, then a named schedule, as in diffusers, sd-scripts and transformers.

    name: `constant`, `constant_with_warmup`, `linear`, `cosine`, `cosine_with_restarts`, `polynomial`; steps: the end
    of the schedule; warmup: steps of the warm-up; cycles: of `cosine_with_restarts`; power: of `polynomial`; end: the
    factor at the end.
    """

    WAYS = {
        "constant": lambda share, cycles, power: 1.0,
        "constant_with_warmup": lambda share, cycles, power: 1.0,
        "linear": lambda share, cycles, power: 1 - share,
        "cosine": lambda share, cycles, power: half_cosine(share, 1.0, 0.0),  # SGDR (arXiv 1608.03983) Eq. 5
        "cosine_with_restarts": lambda share, cycles, power: (
            half_cosine(cycles * share % 1, 1.0, 0.0) if share < 1 else 0.0
        ),
        "polynomial": lambda share, cycles, power: (1 - share) ** power,
    }

    def __init__(
        self,
        name: str,
        steps: int | None = None,
        warmup: int = 0,
        cycles: int = 1,
        power: float = 1.0,
        end: float = 0.0,
    ):
        self.way, self.steps, self.warmup = self.WAYS[name], steps, warmup
        self.cycles, self.power, self.end = cycles, power, end

    def schedule(self, n: int) -> float:
        """The factor at step n."""
        if n < self.warmup:
            return n / self.warmup
        share = 0.0 if self.steps is None else min(1.0, (n - self.warmup) / (self.steps - self.warmup))
        return self.end + (1 - self.end) * self.way(share, self.cycles, self.power)


class NamedStages:
    """Named schedules in sequence; each one counts its own steps from 0.

    stages: the parameters of `NamedSchedule`, each with `steps`, the length of its stage. After the last stage the
    factor is constant. Raises `InputError` for a stage that is not longer than its warm-up, and for an unknown name.
    """

    def __init__(self, stages: Sequence[Mapping[str, Any]]):
        for stage in stages:
            if stage["name"] not in NamedSchedule.WAYS:
                names = ", ".join(NamedSchedule.WAYS)
                raise InputError(f"learning-rate schedule {stage['name']!r} is unknown; expected {names}")
            if stage["steps"] <= stage.get("warmup", 0):
                raise InputError(f"a warm-up of {stage['warmup']} steps leaves nothing of a stage of {stage['steps']}")
        self.stages = [(stage["steps"], NamedSchedule(**stage)) for stage in stages]

    def schedule(self, n: int) -> float:
        """The factor at step n."""
        for length, stage in self.stages[:-1]:
            if n < length:
                return stage.schedule(n)
            n -= length
        return self.stages[-1][1].schedule(n)


def _told(scheduler, n: int, factor: float) -> float:
    if scheduler.verbosity_interval > 0 and n % scheduler.verbosity_interval == 0:
        log.info("step %d: learning-rate factor %g", n, factor)
    return factor
