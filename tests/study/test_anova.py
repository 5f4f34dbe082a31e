"""Analyses of variance against published tables and against statsmodels."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import mixedlm, ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multicomp import pairwise_tukeyhsd

from ldm.errors import InputError
from ldm.study import anova
from ldm.study.anova import Design

# NIST StRD, one-way analysis of variance: SiRstv (silicon resistivity), certified to 15 digits.
SIRSTV = [
    [196.3052, 196.1240, 196.1890, 196.2569, 196.3403],
    [196.3042, 196.3825, 196.1669, 196.3257, 196.0422],
    [196.1303, 196.2005, 196.2889, 196.0343, 196.1811],
    [196.2795, 196.1748, 196.1494, 196.1485, 195.9885],
    [196.2119, 196.1051, 196.1850, 196.0052, 196.2090],
]
# Montgomery, Design and Analysis of Experiments, the vascular graft experiment: 4 pressures, 6 batches of resin.
GRAFT = [
    [90.3, 89.2, 98.2, 93.9, 87.4, 97.9],
    [92.5, 89.5, 90.6, 94.7, 87.0, 95.8],
    [85.5, 90.8, 89.6, 86.2, 88.0, 93.4],
    [82.5, 89.5, 85.6, 87.4, 78.9, 90.7],
]
# Crampton (1947), ToothGrowth of R: length by supplement and dose, ten animals each.
TEETH = {
    ("VC", 0.5): [4.2, 11.5, 7.3, 5.8, 6.4, 10, 11.2, 11.2, 5.2, 7],
    ("VC", 1): [16.5, 16.5, 15.2, 17.3, 22.5, 17.3, 13.6, 14.5, 18.8, 15.5],
    ("VC", 2): [23.6, 18.5, 33.9, 25.5, 26.4, 32.5, 26.7, 21.5, 23.3, 29.5],
    ("OJ", 0.5): [15.2, 21.5, 17.6, 9.7, 14.5, 10, 8.2, 9.4, 16.5, 9.7],
    ("OJ", 1): [19.7, 23.3, 23.6, 26.4, 20, 25.2, 25.8, 21.2, 14.5, 27.3],
    ("OJ", 2): [25.5, 26.4, 22.4, 24.5, 24.8, 30.9, 26.4, 27.3, 29.4, 23],
}


def one_factor(groups):
    return pd.DataFrame([{"level": f"l{i}", "y": value} for i, own in enumerate(groups) for value in own])


def graft():
    rows = [{"pressure": f"p{i}", "batch": f"b{j}", "y": y} for i, own in enumerate(GRAFT) for j, y in enumerate(own)]
    return Design(pd.DataFrame(rows), "y", ["pressure"], "batch")


def teeth():
    rows = [{"supp": s, "dose": d, "len": y} for (s, d), own in TEETH.items() for y in own]
    return pd.DataFrame(rows)


def test_nist_sirstv():
    [found] = anova.one_way(Design(one_factor(SIRSTV), "y", ["level"]))
    assert found.f == pytest.approx(1.18046237440255, rel=1e-8)
    assert found.sum_sq == pytest.approx(5.11462616e-02, rel=1e-8) and (found.df, found.df_error) == (4, 20)


def test_nist_smls01():
    """Simulated: 9 treatments of 21; certified F 21, between 1.68, within 1.80."""
    centres = [1.4] + [1.3, 1.5] * 4
    groups = [[centre] + [centre - 0.1, centre + 0.1] * 10 for centre in centres]
    [found] = anova.one_way(Design(one_factor(groups), "y", ["level"]))
    assert found.f == pytest.approx(21.0, rel=1e-9) and found.sum_sq == pytest.approx(1.68, rel=1e-9)
    assert found.eta2 == pytest.approx(1.68 / 3.48) and found.df_error == 180


def test_randomised_blocks():
    design = graft()
    [found] = anova.one_way(design)
    assert (round(found.sum_sq, 2), round(found.f, 2), round(found.p, 4)) == (178.17, 8.11, 0.0019)
    assert (found.df, found.df_error) == (3, 15)
    table = np.array(GRAFT)
    assert anova.by_ranks(design)[1].statistic == pytest.approx(stats.friedmanchisquare(*table).statistic)


def test_two_factors():
    design = Design(teeth(), "len", ["supp", "dose"])
    for kind in (2, 3):  # balanced: the types agree
        found = anova.factorial(design, kind)
        assert [round(one.sum_sq, 2) for one in found] == [205.35, 2426.43, 108.32]
        assert [round(one.f, 3) for one in found] == [15.572, 92.0, 4.107]
        assert [one.df for one in found] == [1, 2, 2]


@pytest.fixture(scope="module")
def unbalanced():
    keep = np.random.default_rng(0).random(60) < 0.6
    return teeth()[keep]


@pytest.mark.parametrize(("kind", "coding"), [(2, "C({})"), (3, "C({}, Sum)")])
def test_unbalanced_tables_are_those_of_statsmodels(unbalanced, kind, coding):
    a, b = coding.format("supp"), coding.format("dose")
    theirs = anova_lm(ols(f"len ~ {a} * {b}", unbalanced.rename(columns={"len": "len"})).fit(), typ=kind)
    ours = anova.factorial(Design(unbalanced, "len", ["supp", "dose"]), kind)
    for one, name in zip(ours, (a, b, f"{a}:{b}"), strict=True):
        assert one.sum_sq == pytest.approx(theirs.loc[name, "sum_sq"], rel=1e-6)
        assert one.f == pytest.approx(theirs.loc[name, "F"], rel=1e-6)


def test_empty_cells_take_degrees_of_freedom_away(unbalanced):
    missing = unbalanced[~((unbalanced.supp == "OJ") & (unbalanced.dose == 2))]
    design = Design(missing, "len", ["supp", "dose"])
    assert [one.df for one in anova.factorial(design)] == [1, 2, 1]  # not 2 for the interaction
    assert any("1 of 6 cells are empty" in line for line in design.in_words())
    with pytest.raises(InputError, match="type III is not estimable"):
        anova.factorial(design, 3)


def test_tukey_is_that_of_statsmodels():
    frame = one_factor(SIRSTV)
    theirs = pairwise_tukeyhsd(frame["y"], frame["level"])
    ours = anova.pairs(Design(frame, "y", ["level"]))
    assert [one.p_tukey for one in ours] == pytest.approx(list(theirs.pvalues), abs=1e-4)
    assert [-one.difference for one in ours] == pytest.approx(list(theirs.meandiffs))
    assert all(one.p_holm >= one.p_tukey * 0.3 for one in ours)


def test_the_interval_of_an_effect_size():
    """Smithson (2003): F(3, 36) = 4.0 inverted; checked by the noncentral F itself."""
    low, high = anova.eta_interval(4.0, 3, 36)
    for bound, share in ((low, 0.975), (high, 0.025)):
        assert stats.ncf.cdf(4.0, 3, 36, 40 * bound / (1 - bound)) == pytest.approx(share, abs=1e-6)
    assert anova.eta_interval(0.5, 3, 36)[0] == 0.0


def test_omega_is_unbiased_where_there_is_no_effect():
    generator = np.random.default_rng(1)
    found = [anova.one_way(Design(one_factor(generator.normal(size=(4, 10))), "y", ["level"]))[0] for _ in range(40)]
    assert np.mean([one.eta2 for one in found]) > 0.05 > np.mean([one.omega2 for one in found])
    assert 0 <= sum(one.p < 0.05 for one in found) <= 6


def test_a_mixed_model_finds_what_differs_within_blocks():
    generator = np.random.default_rng(2)
    rows = [
        {"reads": f"r{r}", "subject": f"s{s}", "y": 3 * s + 0.5 * (r == 1) + generator.normal(scale=0.2)}
        for s in range(6) for r in range(3) for _ in range(2)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    [within] = anova.mixed(Design(frame, "y", ["reads"], "subject"))
    [without] = anova.one_way(Design(frame, "y", ["reads"]))
    assert within.p < 1e-4 and without.p > 0.5
    assert anova.mixed(Design(frame, "y", ["reads"]))[0].note == "there is one block only"


def test_a_mixed_model_of_an_incomplete_table():
    """Only c is written to z: two columns are equal, which changes no likelihood."""
    generator = np.random.default_rng(3)
    cells = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), ("c", "z")]
    rows = [
        {"reads": r, "writes": w, "subject": f"s{s}", "y": s + 0.1 * (r == "b") + generator.normal(scale=0.2)}
        for s in range(6) for r, w in cells for _ in range(3)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    b, y, c = (frame[key] == level for key, level in (("reads", "b"), ("writes", "y"), ("reads", "c")))
    frame = frame.assign(b=b.astype(float), w=y.astype(float), c=c.astype(float))
    terms = ("b + w + c", "w + c", "b + c")
    fits = (mixedlm(f"y ~ {one}", frame, groups=frame["subject"]).fit(reml=False) for one in terms)
    whole, *parts = (fitted.llf for fitted in fits)
    found = anova.mixed(Design(frame, "y", ["reads", "writes"], "subject"))
    for test, part in zip(found, parts, strict=True):
        assert test.statistic == pytest.approx(2 * (whole - part), rel=1e-3, abs=1e-4)
        assert test.p == pytest.approx(stats.chi2.sf(2 * (whole - part), 1), rel=1e-2)


def test_mean_ranks_and_their_critical_difference():
    """Demšar (2006), table 6: 14 data sets and 4 classifiers have a critical difference of 1.25 at 5 %."""
    generator = np.random.default_rng(3)
    rows = [{"c": f"c{i}", "d": f"d{j}", "y": i + generator.normal(scale=0.1)} for i in range(4) for j in range(14)]
    ranks, critical, blocks = anova.mean_ranks(Design(pd.DataFrame(rows), "y", ["c"], "d"))
    assert ranks == {"c0": 4.0, "c1": 3.0, "c2": 2.0, "c3": 1.0} and blocks == 14
    assert critical == pytest.approx(1.25, abs=0.005)


def test_power_is_what_simulation_gives():
    pilot = anova.Effect("x", 0, 2, 27, 0, 0, 0, 0.15, (0, 0))
    expected = anova.power(pilot, levels=3, observations=45)
    generator, spread = np.random.default_rng(4), math.sqrt(1.5 * 0.15 / 0.85)
    centres = spread * np.array([-1, 0, 1])
    rejected = np.mean([
        stats.f_oneway(*(generator.normal(centre, size=15) for centre in centres)).pvalue < 0.05 for _ in range(600)
    ])  # fmt: skip
    assert expected == pytest.approx(rejected, abs=0.06) and anova.power(pilot, 3, 90) > expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("len", ["sup"]), "there is no column 'sup'"),
        (("len", ["supp", "supp"]), "all of them different"),
        (("len", ["one"]), "single level"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Design(teeth().assign(one="x"), *arguments)


def test_names_of_columns_are_never_evaluated():
    name = '__import__("os").system("exit 1")'
    frame = teeth().rename(columns={"supp": name, "len": "y`); raise"})
    [found] = anova.one_way(Design(frame, "y`); raise", [name]))
    assert found.term == name and found.sum_sq == pytest.approx(205.35)
