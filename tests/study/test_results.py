"""The rows of trials in their files, and the table."""

import json

import pytest

from ldm.errors import InputError
from ldm.study.results import COLUMNS, Results


def row(key, status="done", finished="1", **more):
    return {"key": key, "status": status, "finished": finished, "recipe": f"r{key}", "trial": 0, "step": 4, **more}


def test_what_was_added_is_there_again(tmp_path):
    results = Results(tmp_path)
    results.add("g1", [row("a", step=2), row("a"), row("b", "failed")])
    again = Results(tmp_path)
    assert [again.status(key) for key in "abc"] == ["done", "failed", None]
    assert again.status("x", "ra") == "done" and again.status("x", "rx") is None
    assert len(again.rows["a"]) == 2


def test_a_finished_trial_wins_over_failures_and_the_later_over_the_earlier(tmp_path):
    results = Results(tmp_path)
    results.add("g1", [row("a", "failed", "1")])
    results.add("g0", [row("a", "done", "2", clip_i=0.5)])
    results.add("g9", [row("a", "failed", "3")])
    for known in (results, Results(tmp_path)):
        assert known.status("a") == "done" and known.rows["a"][0]["clip_i"] == 0.5


def test_the_table_has_the_columns_and_nested_values_as_json(tmp_path):
    pandas = pytest.importorskip("pandas")
    results = Results(tmp_path)
    results.add("g", [row("b", trial=1, clip_i=0.25), row("a", step=2, config={"x": [1]}), row("a")])
    frame = pandas.read_parquet(results.table())
    assert tuple(frame.columns[: len(COLUMNS)]) == COLUMNS
    assert frame.key.tolist() == ["a", "a", "b"] and frame.step.tolist() == [2, 4, 4]
    assert json.loads(frame.config[0]) == {"x": [1]} and frame.clip_i[2] == 0.25


@pytest.mark.parametrize("content", ["{}", "[1]", "[{}]", "[", '[{"key": "a"}]'])
def test_a_damaged_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "g.json").write_text(content)
    with pytest.raises(InputError, match="g.json"):
        Results(tmp_path)
