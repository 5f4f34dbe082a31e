"""Analysis of variance of a sweep (arXiv 2303.18181, section 4.2): does the position of an adapter decide its score?

The design is a randomised block: subjects are blocks, seeds are replicates, positions are fixed factors. Routes form an
incomplete table, since nothing is written before it is read: sums of squares come from comparing nested models by their
ranks, so that empty cells take degrees of freedom away instead of giving wrong ones.

Columns and levels are renamed before formulas are made: what a file or a command line calls them is never evaluated.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from patsy import dmatrix
from scipy import optimize, stats
from scipy.linalg import qr
from statsmodels.formula.api import ols
from statsmodels.regression.mixed_linear_model import MixedLM
from statsmodels.stats.multitest import multipletests
from statsmodels.tools.sm_exceptions import ConvergenceWarning, SingularMatrixWarning

from ldm.errors import InputError


@dataclass(frozen=True)
class Effect:
    """A line of an ANOVA table. Effect sizes are partial; intervals are of eta² and come from the noncentral F."""

    term: str
    sum_sq: float
    df: int
    df_error: int
    f: float
    p: float
    eta2: float
    omega2: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Pair:
    """A comparison of two levels of a factor, as means adjusted for the blocks."""

    a: str
    b: str
    difference: float
    p_tukey: float
    p_holm: float


@dataclass(frozen=True)
class Test:
    """Another test: its statistic and p value; `note` says why there is none."""

    name: str
    statistic: float | None
    p: float | None
    note: str = ""


class Design:
    """The observations of an analysis: a metric, one or two factors, and a block, or none.

    Raises `InputError` for columns that are absent, values that are not numbers, and factors with a single level.
    """

    def __init__(self, frame: pd.DataFrame, metric: str, factors: Sequence[str], block: str | None = None) -> None:
        names = [metric, *factors, *([block] if block else [])]
        for name in names:
            if name not in frame.columns:
                raise InputError(f"there is no column {name!r}: the results have {', '.join(map(str, frame.columns))}")
        if not 1 <= len(factors) <= 2 or len(set(names)) < len(names):
            raise InputError(
                "an analysis takes one or two factors, a metric and a block, all of them different columns"
            )
        values = pd.to_numeric(frame[metric], errors="coerce")
        used = frame[names].assign(**{metric: values}).dropna()
        self.dropped = len(frame) - len(used)
        self.metric, self.factors, self.block = metric, list(factors), block
        self.keys = {f"f{number}": name for number, name in enumerate(factors)}
        columns: dict[str, Any] = {"y": used[metric].to_numpy(float)}
        self.labels: dict[str, dict[str, str]] = {}  # column -> level in formulas -> level as it is called
        for key, name in (self.keys | ({"b": block} if block else {})).items():
            levels = used[name].astype(str)
            codes = {level: f"l{number}" for number, level in enumerate(sorted(levels.unique()))}
            columns[key] = levels.map(codes).to_numpy()
            self.labels[key] = {code: level for level, code in codes.items()}
        self.data = pd.DataFrame(columns)
        for key, name in self.keys.items():
            if self.data[key].nunique() < 2:
                raise InputError(f"the factor {name} has a single level in these results: nothing to compare")

    @property
    def blocks(self) -> list[str]:
        """The formula's terms for the blocks."""
        return ["C(b)"] if self.block and self.data["b"].nunique() > 1 else []

    def cells(self) -> pd.DataFrame:
        """How many observations each combination of levels has."""
        if len(self.factors) == 1:
            return self.data.groupby("f0").size().to_frame("n").rename(index=self.labels["f0"])
        counted = pd.crosstab(self.data["f0"], self.data["f1"])
        return counted.rename(index=self.labels["f0"], columns=self.labels["f1"])

    def in_words(self) -> list[str]:
        """The design, as sentences."""
        data, cells = self.data, self.cells().to_numpy()
        levels = " x ".join(f"{data[key].nunique()} {name}" for key, name in self.keys.items())
        lines = [f"{len(data)} observations of {self.metric}; {levels}"]
        if self.block:
            lines.append(f"blocks: {data['b'].nunique()} of {self.block}")
        counts = cells[cells > 0]
        spread = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
        lines.append(f"{spread} observations in each cell")
        if empty := int((cells == 0).sum()):
            lines.append(f"{empty} of {cells.size} cells are empty: an incomplete table")
        if self.dropped:
            lines.append(f"{self.dropped} rows without {self.metric} or a factor were left out")
        return lines


# --- fixed effects ------------------------------------------------------------------------------------------------


def fit(design: Design, terms: Sequence[str]) -> Any:
    """Ordinary least squares of the metric on terms of a formula; ranks, not columns, are its degrees of freedom."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingularMatrixWarning)  # an incomplete table, which the design says
        return ols("y ~ " + (" + ".join(terms) or "1"), design.data).fit()


def effect(term: str, reduced: Any, larger: Any, full: Any) -> Effect:
    """What `larger` explains beyond `reduced`, against the error of `full`. Raises `InputError` without error."""
    df, df_error = int(round(reduced.df_resid - larger.df_resid)), int(round(full.df_resid))
    if df_error < 1:
        raise InputError("there are no observations left for the error: more seeds or subjects are needed")
    error, sum_sq = full.ssr / df_error, max(float(reduced.ssr - larger.ssr), 0.0)
    if df < 1:
        return Effect(term, sum_sq, 0, df_error, math.nan, math.nan, math.nan, math.nan, (math.nan, math.nan))
    f = sum_sq / df / error if error else math.inf
    count = full.nobs
    omega = (sum_sq - df * error) / (sum_sq + (count - df) * error) if error else 1.0
    return Effect(
        term, sum_sq, df, df_error, f, float(stats.f.sf(f, df, df_error)), sum_sq / (sum_sq + full.ssr),
        max(float(omega), 0.0), eta_interval(f, df, df_error),
    )  # fmt: skip


def eta_interval(f: float, df: int, df_error: int, level: float = 0.95) -> tuple[float, float]:
    """The interval of partial eta² = lambda / (lambda + df + df_error + 1) from the noncentral F (Steiger 2004)."""
    if not math.isfinite(f):
        return math.nan, math.nan
    scale = df + df_error + 1

    def bound(share: float) -> float:
        def excess(noncentrality: float) -> float:
            return stats.ncf.cdf(f, df, df_error, noncentrality) - share if noncentrality > 0 else (
                stats.f.cdf(f, df, df_error) - share
            )  # fmt: skip

        if excess(0.0) <= 0:
            return 0.0
        high = max(10.0, 4 * f * df)
        while excess(high) > 0:
            high *= 2
        return float(optimize.brentq(excess, 0.0, high))

    tail = (1 - level) / 2
    return tuple(value / (value + scale) for value in (bound(1 - tail), bound(tail)))


def one_way(design: Design) -> list[Effect]:
    """Each factor by itself within the blocks, and the blocks."""
    found = []
    for key, name in design.keys.items():
        without, with_it = fit(design, design.blocks), fit(design, [*design.blocks, f"C({key})"])
        found.append(effect(name, without, with_it, with_it))
    return found


def factorial(design: Design, kind: int = 2) -> list[Effect]:
    """Two factors with their interaction within the blocks; sums of squares of type II or III.

    Type II compares models that differ in one term, without the interactions that contain it. Type III takes a term out
    of the whole model (sum contrasts). Raises `InputError` for type III of an incomplete table, where its hypotheses
    depend on which cells are empty.
    """
    names = list(design.keys.values())
    if len(names) != 2:
        raise InputError("a factorial analysis needs two factors")
    contrast = "C({}, Sum)" if kind == 3 else "C({})"
    a, b = (contrast.format(key) for key in design.keys)
    blocks = [contrast.format("b") for _ in design.blocks]
    full = fit(design, [*blocks, a, b, f"{a}:{b}"])
    if kind == 3:
        if (design.cells().to_numpy() == 0).any():
            raise InputError(
                "type III is not estimable: some cells are empty, and its hypotheses would depend on which"
            )
        return [_without(design, full, name, term) for name, term in
                ((names[0], a), (names[1], b), (" x ".join(names), f"{a}:{b}"))]  # fmt: skip
    both = fit(design, [*blocks, a, b])
    return [
        effect(names[0], fit(design, [*blocks, b]), both, full),
        effect(names[1], fit(design, [*blocks, a]), both, full),
        effect(" x ".join(names), both, full, full),
    ]


def _without(design: Design, full: Any, name: str, term: str) -> Effect:
    """The effect of taking the columns of one term out of the whole model."""

    def term_of(column: str) -> set[str]:
        return {part.partition("[")[0] for part in column.split(":")}

    own = [number for number, column in enumerate(full.model.exog_names) if term_of(column) == set(term.split(":"))]
    matrix = np.delete(full.model.exog, own, axis=1)
    reduced = type(full.model)(full.model.endog, matrix).fit()
    return effect(name, reduced, full, full)


# --- the block as a random effect ---------------------------------------------------------------------------------


def mixed(design: Design) -> list[Test]:
    """Likelihood-ratio tests of each factor in a mixed model with the block as random intercept (fitted by ML)."""
    if not design.blocks:
        return [Test("mixed model", None, None, "there is one block only")]
    terms = [f"C({key})" for key in design.keys]
    larger, rank = _mixed_fit(design, terms)
    found = []
    for term, name in zip(terms, design.keys.values(), strict=True):
        smaller, smaller_rank = _mixed_fit(design, [other for other in terms if other != term])
        ratio = max(2 * (larger.llf - smaller.llf), 0.0)
        note = "" if larger.converged and smaller.converged else "the fit did not converge"
        found.append(Test(f"mixed model: {name}", ratio, float(stats.chi2.sf(ratio, rank - smaller_rank)), note))
    return found


def _mixed_fit(design: Design, terms: Sequence[str]) -> tuple[Any, int]:
    """The fitted mixed model and the rank of its fixed effects.

    An incomplete table makes columns that depend on others. They are left out: the likelihood depends only on the
    space that the columns span.
    """
    columns = dmatrix(" + ".join(terms) or "1", design.data)
    *_, triangle, order = qr(np.asarray(columns), mode="economic", pivoting=True)
    sizes = np.abs(np.diag(triangle))
    chosen = np.sort(order[: int((sizes > sizes[0] * 1e-9).sum())])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a variance of zero lies on the border; see `converged`
        warnings.simplefilter("ignore", UserWarning)
        model = MixedLM(design.data["y"].to_numpy(), np.asarray(columns)[:, chosen], groups=design.data["b"])
        return model.fit(reml=False), len(chosen)


# --- pairs, checks and ranks --------------------------------------------------------------------------------------


def pairs(design: Design, key: str = "f0") -> list[Pair]:
    """All pairs of levels of a factor, adjusted for the blocks: Tukey-Kramer and Holm.

    The means are those of the model with blocks and this factor; the error is that model's.
    """
    model = fit(design, [*design.blocks, f"C({key})"])
    levels = sorted(design.data[key].unique())
    names = list(model.params.index)
    covariance = model.cov_params().to_numpy()

    def row(level: str) -> np.ndarray:
        return np.array([float(name == f"C({key})[T.{level}]") for name in names])

    found = []
    for a, b in itertools.combinations(levels, 2):
        weights = row(a) - row(b)
        difference, error = float(weights @ model.params.to_numpy()), math.sqrt(weights @ covariance @ weights)
        t = abs(difference) / error if error else math.inf
        tukey = float(stats.studentized_range.sf(t * math.sqrt(2), len(levels), model.df_resid))
        found.append((a, b, difference, tukey, 2 * float(stats.t.sf(t, model.df_resid))))
    holm = multipletests([p for *_, p in found], method="holm")[1]
    called = design.labels[key]
    return [Pair(called[a], called[b], d, tukey, float(p)) for (a, b, d, tukey, _), p in zip(found, holm, strict=True)]


def checks(design: Design) -> list[Test]:
    """Whether the model's assumptions hold: normal residuals (Shapiro-Wilk), equal variances (Brown-Forsythe)."""
    model = fit(design, [*design.blocks, *(f"C({key})" for key in design.keys)])
    shapiro = stats.shapiro(model.resid)
    found = [Test("normal residuals (Shapiro-Wilk)", float(shapiro.statistic), float(shapiro.pvalue))]
    for key, name in design.keys.items():
        groups = [own.to_numpy() for _, own in model.resid.groupby(design.data[key]) if len(own) > 1]
        if len(groups) < 2:
            found.append(Test(f"equal variances by {name} (Brown-Forsythe)", None, None, "too few observations"))
            continue
        levene = stats.levene(*groups, center="median")
        found.append(Test(f"equal variances by {name} (Brown-Forsythe)", float(levene.statistic), float(levene.pvalue)))
    return found


def by_ranks(design: Design, key: str = "f0") -> list[Test]:
    """Kruskal-Wallis without the blocks, and Friedman over blocks that have every level (means over replicates)."""
    name = design.keys[key]
    groups = [own.to_numpy() for _, own in design.data["y"].groupby(design.data[key])]
    kruskal = stats.kruskal(*groups)
    found = [Test(f"Kruskal-Wallis by {name}", float(kruskal.statistic), float(kruskal.pvalue))]
    if not design.blocks:
        return [*found, Test(f"Friedman by {name}", None, None, "there is one block only")]
    table = design.data.pivot_table(index="b", columns=key, values="y", aggfunc="mean").dropna()
    if len(table) < 2 or table.shape[1] < 3:
        note = "it needs three levels and two complete blocks"
        return [*found, Test(f"Friedman by {name}", None, None, note)]
    friedman = stats.friedmanchisquare(*(table[level] for level in table.columns))
    return [*found, Test(f"Friedman by {name}", float(friedman.statistic), float(friedman.pvalue))]


def mean_ranks(design: Design, key: str = "f0") -> tuple[dict[str, float], float, int]:
    """(mean rank of each level over complete blocks, 1 the best; Nemenyi's critical difference at 5 %; blocks).

    Demšar (2006), JMLR 7, section 3.2.2. Raises `InputError` for fewer than two complete blocks.
    """
    table = design.data.pivot_table(
        index="b" if design.block else None, columns=key, values="y", aggfunc="mean"
    ).dropna()
    if not design.block or len(table) < 2:
        raise InputError("ranks need two blocks in which every level was run")
    ranks = table.rank(axis=1, ascending=False).mean()
    count, levels = len(table), table.shape[1]
    critical = stats.studentized_range.isf(0.05, levels, np.inf) / math.sqrt(2)
    return (
        ranks.rename(design.labels[key]).to_dict(),
        float(critical * math.sqrt(levels * (levels + 1) / (6 * count))),
        count,
    )


def power(effect_of_pilot: Effect, levels: int, observations: int, blocks: int = 0, alpha: float = 0.05) -> float:
    """The chance to find an effect as large as a pilot's with that many observations in all (noncentral F).

    The effect's omega² is taken, which is not inflated by chance as eta² is; lambda = n omega² / (1 - omega²).
    """
    df, df_error = levels - 1, observations - levels - max(blocks - 1, 0)
    if df_error < 1:
        return 0.0
    noncentrality = observations * effect_of_pilot.omega2 / (1 - min(effect_of_pilot.omega2, 0.999))
    critical = stats.f.isf(alpha, df, df_error)
    return float(stats.ncf.sf(critical, df, df_error, noncentrality)) if noncentrality else alpha
