"""Stopping hopeless trials early: asynchronous successive halving (Li et al., arXiv 1810.05934), as Ray Tune has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from ldm.errors import InputError


def rungs(first: int, last: int, factor: int) -> list[int]:
    """The steps after which trials are compared: first, first * factor, ... below `last`.

    Raises `InputError` for numbers of which none is left.
    """
    if factor < 2 or not 0 < first < last:
        raise InputError(f"asha: expected 0 < grace < steps and a factor of at least 2, got {first}, {last}, {factor}")
    found = [first]
    while found[-1] * factor < last:
        found.append(found[-1] * factor)
    return found


class Judge:
    """Says after each rung whether a trial goes on, by Tune's ASHA over the trials that came so far.

    Which trials are stopped depends on the order in which they come. `known` are the rows of trials that had come to
    their end before: those of an interrupted sweep count again.
    """

    def __init__(
        self, metric: str, first: int, last: int, factor: int, known: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        try:
            from ray.tune.schedulers import ASHAScheduler
        except ImportError as error:
            raise InputError(f"--scheduler asha needs {error.name}: pip install '.[sweep]'") from None
        self.metric = metric
        self.scheduler = ASHAScheduler(
            time_attr="step", metric=metric, mode="max", max_t=last, grace_period=first, reduction_factor=factor
        )
        self.trials: dict[str, SimpleNamespace] = {}
        for row in sorted((row for row in known if row.get("step")), key=lambda row: (row["finished"], row["step"])):
            self.goes_on(row["key"], row["step"], row)

    def goes_on(self, key: str, step: int, scores: Mapping[str, float]) -> bool:
        """Whether a trial with these scores after so many steps is worth going on with."""
        if key not in self.trials:
            self.trials[key] = SimpleNamespace(trial_id=key)
            self.scheduler.on_trial_add(None, self.trials[key])
        result = {"step": step, self.metric: scores[self.metric]}
        return self.scheduler.on_trial_result(None, self.trials[key], result) != self.scheduler.STOP
