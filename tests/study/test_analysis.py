"""`ldm anova`: the report in words, its files and figures, what is left out and what is refused."""

import json

import numpy as np
import pandas as pd
import pytest

from ldm.commands import Program
from ldm.errors import InputError
from ldm.study import analysis
from ldm.study.observations import last_of_each_trial, read_results

ROUTES = ["attn1i-ffni", "attn1i-transo", "attn2o-ffni", "attn2o-transo", "ffni-ffni", "ffni-transo", "transo-transo"]


def sweep(seeds=2, subjects=4):
    """Results as a sweep writes them; what reads at attn2o is better by 0.1, the writing position does not matter."""
    generator = np.random.default_rng(0)
    rows = []
    for route in ROUTES:
        reads, writes = route.split("-")
        for subject in range(subjects):
            for seed in range(seeds):
                score = 0.6 + 0.05 * subject + 0.1 * (reads == "attn2o") + generator.normal(scale=0.02)
                common = {"key": f"{route}{subject}{seed}", "route": route, "reads": reads, "writes": writes,
                          "family": "position", "subject": f"s{subject}", "seed": seed, "status": "done"}  # fmt: skip
                rows += [common | {"step": 100, "clip_i": 0.1}, common | {"step": 200, "clip_i": score}]
    rows.append({**rows[0], "key": "other", "status": "failed", "clip_i": None})
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "results.parquet"
    sweep().to_parquet(path)
    return path


def test_one_row_counts_for_each_finished_trial():
    frame, notes = last_of_each_trial(sweep())
    assert len(frame) == 7 * 4 * 2 and set(frame.step) == {200} and set(frame.status) == {"done"}
    assert [note.split()[0] for note in notes] == ["1", "56"]


def test_the_reading_position_is_found(results, capsys):
    Program("anova")([str(results), "--metric", "clip_i", "--factors", "reads,writes", "--block", "subject", "--power"])
    text = capsys.readouterr().out
    first, second = text.splitlines()[:2]
    assert first.startswith("clip_i differs between the levels of reads: F(3, ") and "p < 0.001" in first
    assert second.startswith("clip_i is not shown to differ between the levels of writes")
    for part in ("1 of 8 cells are empty", "type III is not estimable", "Friedman", "p Holm", "power for reads",
                 "56 rows of earlier checkpoints were left out", "blocks: 4 of subject"):  # fmt: skip
        assert part in text, part


@pytest.mark.slow
def test_files_and_figures(results, tmp_path, capsys):
    Program("anova")([str(results), "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "anova.json").read_text())
    assert found["factors"] == ["reads", "writes"] and len(found["pairs"]["reads"]) == 6
    table = pd.read_csv(tmp_path / "out" / "anova.csv")
    assert set(table.term) == {"reads", "writes", "reads x writes"}
    assert r"\begin{tabular}" in (tmp_path / "out" / "anova.tex").read_text()
    assert "clip\\_i" not in (tmp_path / "out" / "anova.md").read_text()
    for name in ("heat-map", "interaction", "boxes-reads", "critical-differences-writes"):
        for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
            assert (tmp_path / "out" / f"{name}.{ending}").read_bytes().startswith(start)


def test_one_factor_without_blocks():
    found = analysis.analyse(last_of_each_trial(sweep())[0], "clip_i", ["reads"], None)
    assert list(found.tables) == ["one-way"] and found.tables["one-way"][0].p < 0.001
    assert "differs between the levels of reads" in analysis.in_words(found)


def test_text_is_safe_in_latex():
    assert latex_of("a_b & 5 %\\x{y}") == r"a\_b \& 5 \%\textbackslash{}x\{y\}"


def latex_of(text):
    return analysis.latex(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "clip"], "there is no column 'clip'"),
        (["--where", "familly=lora"], "no such column; did you mean family"),
        (["--where", "family=lora"], "no row has family=lora"),
        (["--factors", "reads,writes,seed"], "one or two factors"),
    ],
)
def test_what_is_refused(results, words, message):
    with pytest.raises(InputError, match=message):
        Program("anova")([str(results), *words])


def test_files_that_are_no_results(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_results(tmp_path / "results.parquet")
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(InputError, match="is not a table of results"):
        read_results(tmp_path / "a.parquet")
