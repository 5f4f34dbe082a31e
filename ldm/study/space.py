"""From what varies to a list of trials: a grid, random draws, or a list as it is written."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ldm.errors import InputError, did_you_mean, short

Settings = dict[str, Any]  # word -> value of one trial


def _numbers(count: int) -> Callable[[Sequence[Any]], bool]:
    return lambda given: len(given) == count and all(isinstance(v, (int, float)) for v in given)


def _positive(given: Sequence[Any]) -> bool:
    return _numbers(2)(given) and 0 < given[0] < given[1]


# Distributions by the names that they have in `ray.tune`: what they need, and a draw. A search space of Tune in words.
DRAWS: dict[str, tuple[str, Callable[[Sequence[Any]], bool], Callable[[random.Random, Sequence[Any]], Any]]] = {
    "choice": ("values", lambda given: len(given) > 0, lambda rng, given: given[rng.randrange(len(given))]),
    "uniform": ("[low, high]", _numbers(2), lambda rng, given: rng.uniform(*given)),
    "loguniform": ("[low, high], both positive", _positive,
                   lambda rng, given: math.exp(rng.uniform(math.log(given[0]), math.log(given[1])))),
    "quniform": ("[low, high, step]", _numbers(3),
                 lambda rng, given: round(rng.uniform(*given[:2]) / given[2]) * given[2]),
    "randint": ("[low, high), whole numbers", _numbers(2), lambda rng, given: rng.randrange(*map(int, given))),
    "randn": ("[mean, standard deviation]", _numbers(2), lambda rng, given: rng.gauss(*given)),
}  # fmt: skip


def grid(values: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Every combination; the last word varies fastest."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def is_distribution(value: Any) -> bool:
    """Whether it is `{loguniform: [1e-4, 1e-2]}` or the like, or a domain of `ray.tune`."""
    return isinstance(value, Mapping) or hasattr(value, "sample")


def drawn(space: Mapping[str, Any], count: int, seed: int) -> list[Settings]:
    """`count` trials, each with one value of every word, drawn from lists and distributions.

    A draw is a function of its number, its word and the seed: more trials, or another word, change no other draw.
    Domains of `ray.tune` are drawn by their own `sample`. Raises `InputError` for a distribution that is unknown or
    lacks numbers.
    """
    for name, values in space.items():
        check_distribution(name, values)
    return [
        {name: _draw(values, f"{seed} {name} {number}") for name, values in space.items()} for number in range(count)
    ]


def check_distribution(name: str, values: Any) -> None:
    """Raises `InputError` for a distribution that is unknown or lacks numbers."""
    if not isinstance(values, Mapping):
        return
    kind, *more = values
    if more or kind not in DRAWS:
        raise InputError(f"{name}: unknown distribution {short(dict(values))}{did_you_mean(kind, DRAWS)}")
    told, fits, _ = DRAWS[kind]
    if not isinstance(values[kind], list) or not fits(values[kind]):
        raise InputError(f"{name}: {kind} takes {told}, got {short(values[kind])}")


def _draw(values: Any, stream: str) -> Any:
    rng = random.Random(stream)
    if hasattr(values, "sample"):
        import numpy as np

        return values.sample(random_state=np.random.RandomState(rng.getrandbits(32)))
    if isinstance(values, Mapping):
        ((kind, given),) = values.items()
        return DRAWS[kind][2](rng, given)
    return values[rng.randrange(len(values))]
