"""docs/study.md says what the scores in docs/study say."""

import re

import pytest

from ldm.study.analysis import analyse, conclusion
from ldm.study.observations import read_results, where
from scripts.sd_mini.study_tables import PAGE, filled


def test_the_tables_are_those_of_the_scores():
    assert filled(PAGE.read_text(), PAGE.with_suffix("")) == PAGE.read_text()


@pytest.mark.parametrize("name", ["positions", "positions-fast"])
def test_the_analysis_is_that_of_the_scores(name):
    """Each F with its degrees of freedom, as `ldm anova` prints it."""
    found = analyse(read_results(PAGE.with_suffix("") / f"{name}.csv"), "clip_i", ["reads", "writes"], "subject")
    said = " ".join(PAGE.read_text().split())
    for sentence in conclusion(found):
        assert re.search(r"F\(.*", sentence)[0] in said


def test_every_trial_has_ended():
    for name, count in {"positions": 360, "positions-fast": 120}.items():
        rows = where(read_results(PAGE.with_suffix("") / f"{name}.csv"), {"status": "done"})
        assert len(rows) == count == rows.groupby(["route", "subject", "seed"]).ngroups
