"""Learning rates by parameter name, e.g. a smaller one for the text encoder, or LoRA+.

`{"cond_stage_model.*": 5.0e-05, "*.lora_B.*": x16}`: patterns of state-dict names, where `*` crosses dots; the first
match counts. A number is a learning rate; `x16` multiplies the rate of the family or the model (LoRA+, arXiv
2402.12354, section 4, uses a ratio of 16 between B and A).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ldm.errors import InputError, short


def check_rates(rates: Mapping[str, float | str] | None) -> dict[str, float | str]:
    """A copy of the mapping. Raises `InputError` for values other than positive numbers and factors such as x16."""
    for pattern, rate in (rates or {}).items():
        if not _is_positive(_factor(rate) if isinstance(rate, str) else rate):
            raise InputError(f"the learning rate of {pattern!r} must be a positive number or x16, got {short(rate)}")
    return dict(rates or {})


def rate_of(name: str, rates: Mapping[str, float | str], usual: float) -> float:
    """The learning rate of a parameter; `usual` is the rate of its family or of the model."""
    for pattern, rate in rates.items():
        if fnmatchcase(name, pattern):
            return usual * _factor(rate) if isinstance(rate, str) else float(rate)
    return usual


def refuse_unmatched(rates: Mapping[str, float | str], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises `InputError` for a pattern that matches no trainable parameter."""
    for pattern in rates:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise InputError(
                f"the learning rate of {pattern!r} is for no trainable parameter; their names are like "
                f"{', '.join(list(parameters)[:2]) or '(none)'}"
            )


def grouped(
    families: Sequence[tuple[float | None, Mapping[str, nn.Parameter], Mapping[str, Any]]],
    rates: Mapping[str, float | str],
    usual: float | None,
) -> list[dict[str, Any]]:
    """A group of the optimizer for each learning rate and each set of other options.

    families: (learning rate or None for `usual`, parameters by name, further options of their groups). usual: the
    model's learning rate. Raises `InputError` for a pattern of `rates` that matches no parameter.
    """
    refuse_unmatched(rates, {name: value for _, own, _ in families for name, value in own.items()})
    groups: dict[tuple, list[nn.Parameter]] = {(None, ()): []}  # None: the model's, which comes first
    for family_rate, parameters, options in families:
        own_usual = usual if family_rate is None else family_rate
        for name, parameter in parameters.items():
            rate = rate_of(name, rates, own_usual)
            key = (family_rate if rate == own_usual else rate, tuple(sorted(options.items())))
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, **({} if rate is None else {"lr": rate}), **dict(options)}
        for (rate, options), parameters in groups.items()
        if parameters
    ]


def _factor(rate: str) -> float:
    try:
        return float(rate.removeprefix("x")) if rate.startswith("x") else math.nan
    except ValueError:
        return math.nan


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
