"""What the rows of a sweep say, before it is drawn or printed: its configs, their means, and which are not beaten."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from ldm.errors import InputError, did_you_mean
from ldm.evaluate.intervals import Interval, mean_interval
from ldm.study.observations import last_of_each_trial

BLOCKS = ("subject", "seed")
# Columns that neither name a config nor score it.
OTHERS = frozenset({
    *BLOCKS, "trial", "class_word", "reads", "writes", "step", "seconds", "seconds_training", "seconds_scoring",
    "peak_memory", "parameters", "status", "reason", "key", "recipe", "code", "subject_pictures", "class_pictures",
    "config", "group", "together", "threads", "finished", "worker", "commit", "versions", "device", "each", "networks",
    "base_pictures",
})  # fmt: skip
FIRST = ("route", "family", "base", "lr", "steps", "loss", "mid_dim", "scale", "method", "form")
SCORES = ("clip_i", "clip_t", "dino")  # without intervals, too, where others wrote the table
DISTANCES = ("_fid", "_kid")
# Of one name in several networks: less of it is better.
LESS = re.compile(r"_(fid|kid|prior_shift|prior_alike)$")
DRIFTS = ("_prior_shift", "_prior_alike")
DRAWS = 1000  # resamples of an interval


@dataclass(frozen=True)
class Config:
    """The trials that differ in subject and seed alone.

    means: metric -> mean over the last checkpoints, bootstrapped over subjects, then trials
    curves: metric -> step -> mean over the trials that have this checkpoint
    """

    label: str
    settings: dict[str, Any]
    reads: str | None
    writes: str | None
    trials: int
    means: dict[str, Interval]
    curves: dict[str, dict[int, Interval]]
    parameters: int | None
    seconds: float | None
    memory: float | None


@dataclass
class Facts:
    """A table of results, looked at. `fidelity` and `drift` are its columns; `drift` is None where there is none."""

    frame: pd.DataFrame  # with the column `config_label`
    last: pd.DataFrame
    metrics: list[str]
    settings: list[str]
    configs: list[Config]  # the best first
    fidelity: str
    drift: str | None
    notes: list[str] = field(default_factory=list)

    @cached_property
    def front(self) -> list[Config]:
        """The configs that no other one beats in fidelity and drift at once (the Pareto front), least drift first."""
        if self.drift is None:
            return []
        placed = [(one, *self._place(one)) for one in self.configs if {self.fidelity, self.drift} <= one.means.keys()]
        front = [
            (drift, one)
            for one, fidelity, drift in placed
            if not any(
                f >= fidelity and d <= drift and (f > fidelity or d < drift) for _, f, d in placed
            )
        ]  # fmt: skip
        return [one for _, one in sorted(front, key=lambda pair: pair[0])]

    def _place(self, one: Config) -> tuple[float, float]:
        return one.means[self.fidelity].mean, one.means[self.drift or ""].mean

    @cached_property
    def seconds(self) -> float | None:
        """The time of all trials, scoring of earlier checkpoints included; None where the table does not say."""
        if "seconds" not in self.last:
            return None
        earlier = self.frame.drop(index=self.last.index)
        scoring = earlier["seconds_scoring"].sum() if "seconds_scoring" in earlier else 0.0
        total = float(self.last["seconds"].sum() + scoring)
        return total or None

    @property
    def failed(self) -> pd.DataFrame:
        """The rows of trials without results."""
        return self.frame[self.frame["status"] == "failed"]

    @property
    def has_routes(self) -> bool:
        """Whether there is a table of inputs and outputs to draw."""
        pairs = {(one.reads, one.writes) for one in self.configs if one.reads and one.writes}
        return len(pairs) > 1

    def paired(self, a: Config, b: Config) -> Interval | None:
        """How much the fidelity of `a` exceeds that of `b` over the same subjects and seeds; None without such."""
        tables = [
            self.last[self.last["config_label"] == one.label].groupby(list(BLOCKS))[self.fidelity].mean()
            for one in (a, b)
        ]
        both = (tables[0] - tables[1]).dropna()
        return _mean(both.to_numpy(), both.index.get_level_values(0)) if len(both) else None


def look_at(frame: pd.DataFrame, fidelity: str | None = None, drift: str | None = None) -> Facts:
    """The facts of a table of results. Raises `InputError` where no trial has a score, and for absent columns."""
    frame = _completed(frame)
    metrics = metrics_of(frame)
    fidelity, drift = _scores_to_show(metrics, fidelity, drift)
    last, notes = last_of_each_trial(frame)
    last = last[last[fidelity].notna()]
    if last.empty:
        raise InputError(f"no trial has a score {fidelity}; {len(frame)} rows, {_statuses(frame)}")
    settings = settings_of(last, metrics)
    frame = frame.assign(config_label=[label_of(row, settings) for row in frame.to_dict("records")])
    last = last.assign(config_label=frame["config_label"].loc[last.index])
    ended = frame[frame["status"].isin(("done", "stopped"))]
    configs = [
        _config(str(label), own, ended[ended["config_label"] == label], metrics, settings)
        for label, own in last.groupby("config_label", sort=False)
    ]
    sign = 1 if LESS.search(fidelity) else -1
    configs.sort(key=lambda one: (sign * one.means[fidelity].mean, one.label))
    return Facts(frame, last, metrics, settings, configs, fidelity, drift, notes)


def _scores_to_show(metrics: Sequence[str], fidelity: str | None, drift: str | None) -> tuple[str, str | None]:
    """The scores that are asked for, or the usual ones. Raises `InputError` for absent ones."""
    for given, option in ((fidelity, "--metric"), (drift, "--drift")):
        if given and given not in metrics:
            raise InputError(f"{option} {given}: no score has this name{did_you_mean(given, metrics)}")
    if not metrics:
        raise InputError("there is no score in these results: no trial has ended, or the columns have other names")
    fidelity = fidelity or next((one for one in SCORES if one in metrics), metrics[0])
    drift = drift or next((one for end in DRIFTS for one in metrics if one.endswith(end)), None)
    return fidelity, drift


def _completed(frame: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns that every table of a sweep has."""
    frame = frame.reset_index(drop=True)
    defaults = {"status": "done", "subject": "-", "seed": 0, "step": 0}
    frame = frame.assign(**{name: value for name, value in defaults.items() if name not in frame.columns})
    frame["step"] = pd.to_numeric(frame["step"], errors="coerce")
    if "key" not in frame.columns:
        names = [name for name in (*FIRST, *BLOCKS) if name in frame.columns]
        frame["key"] = [" ".join(map(str, row)) for row in frame[names].itertuples(index=False)]
    return frame


def metrics_of(frame: pd.DataFrame) -> list[str]:
    """The columns that score, in their order: those with an interval, and the ones that are known."""
    names = [str(name) for name in frame.columns]
    return [name for name in names if pd.api.types.is_numeric_dtype(frame[name]) and frame[name].notna().any() and
            (f"{name}_low" in names or name in SCORES or name.endswith(DISTANCES))]  # fmt: skip


def settings_of(frame: pd.DataFrame, metrics: Iterable[str]) -> list[str]:
    """The columns that tell configs apart; not what another one already tells (the width of a route)."""
    scores = {f"{name}{end}" for name in metrics for end in ("", "_low", "_high", "_std")}
    names = [str(name) for name in frame.columns if name not in OTHERS and name not in scores]
    names.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    kept: list[str] = []
    groups = 1
    for name in names:
        if not all(isinstance(value, Hashable) for value in frame[name]):
            continue
        count = len(frame[[*kept, name]].astype(str).drop_duplicates())
        if count > groups:
            kept, groups = [*kept, name], count
    return kept or [name for name in FIRST[:3] if name in frame.columns][:1]


def label_of(row: dict[str, Any], settings: Sequence[str]) -> str:
    """How a config is called: its route, or the config that it starts from, then what else is varied."""
    parts = []
    for name in settings:
        value = row.get(name)
        if absent(value) or (name in ("family", "base") and not absent(row.get("route"))):
            continue
        parts.append(str(value) if name in ("route", "family", "base") else f"{name}={short(value)}")
    return " · ".join(dict.fromkeys(parts)) or "the config"


def absent(value: Any) -> bool:
    """Whether a cell has no value."""
    return value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA


def short(value: Any) -> str:
    """A value as people write it: `0.001`, not `0.0010000000000000002`."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def less_is_better(metric: str) -> bool:
    """Whether a lower value of a score is the better one."""
    return bool(LESS.search(metric))


def _mean(values: Any, groups: Any) -> Interval:
    return mean_interval(values, [str(group) for group in groups], draws=DRAWS)


def _config(
    label: str, last: pd.DataFrame, ended: pd.DataFrame, metrics: Sequence[str], settings: Sequence[str]
) -> Config:
    means, curves = {}, {}
    for name in metrics:
        scored = last[last[name].notna()]
        if len(scored):
            means[name] = _mean(scored[name], scored["subject"])
        steps = ended[ended[name].notna() & ended["step"].notna()].groupby("step")
        curves[name] = {int(step): _mean(own[name], own["subject"]) for step, own in steps}
    first = last.iloc[0]

    def median(name: str) -> float | None:
        values = pd.to_numeric(last[name], errors="coerce").dropna() if name in last else []
        return float(values.median()) if len(values) else None

    def text(name: str) -> str | None:
        return None if absent(first.get(name)) else str(first[name])

    parameters = median("parameters")
    return Config(
        label, {name: first[name] for name in settings if not absent(first[name])}, text("reads"), text("writes"),
        len(last), means, curves, None if parameters is None else int(parameters), median("seconds"),
        median("peak_memory"),
    )  # fmt: skip


def _statuses(frame: pd.DataFrame) -> str:
    return ", ".join(f"{count} {status}" for status, count in frame["status"].value_counts().items())
