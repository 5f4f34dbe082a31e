"""Whole sweeps: rows as they should be, and the same rows whatever happens in between."""

import multiprocessing
import signal
import time

import pytest

from ldm.errors import InputError
from ldm.study.results import Results
from tests.study.conftest import sweep, table

pytest.importorskip("pandas")
pytestmark = pytest.mark.slow


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and process.is_alive(), "it should still be at work"
        time.sleep(0.02)


def test_a_killed_driver_loses_nothing_and_repeats_nothing(work, words, capsys):
    vary = ["route=attn2o-ffni,attn1i-attn2i", "seed=1,2", f"subject={work / 'a'}", "lr=1e-3"]
    assert sweep(*words, *vary, "--out", work / "whole") == 0
    whole = table(work / "whole")
    assert len(whole) == 4 and whole.status.eq("done").all()
    assert whole.step.eq(2).all() and whole.together.eq(2).all() and whole.family.eq("position").all()
    assert whole.clip_i.nunique() == 4 and whole.parameters.gt(0).all() and whole.lr.eq(1e-3).all()

    out = work / "killed"
    process = multiprocessing.get_context("fork").Process(target=sweep, args=(*words, *vary, "--out", out))
    process.start()
    wait_for(lambda: list(out.glob("trials/*.json")), process)
    wait_for(lambda: len(list(out.glob("runs/*"))) > 0, process)  # of the second group
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (first,) = out.glob("trials/*.json")
    before = first.read_bytes()
    capsys.readouterr()
    assert sweep(*words, *vary, "--out", out) == 0
    assert len(list(out.glob("trials/*.json"))) == 2 and first.read_bytes() == before, "no trial ran twice"
    assert table(out).equals(whole), "the same numbers, bit for bit"


def test_a_failed_trial_has_its_reason_and_takes_no_other_with_it(work, words):
    vary = ["lr=1e-3,1e30", f"subject={work / 'a'}", "--every", 1, "--keep", "pictures,adapters"]
    assert sweep(*words, *vary, "--out", work / "out") == 1
    rows = table(work / "out").set_index("lr")
    assert rows.status.tolist() == ["done", "done", "failed"] and rows.step.tolist()[:2] == [1, 2]
    assert len(list((work / "out").glob("pictures/*/00000[12]/0[01].png"))) == 4
    (base,) = {*rows.base_pictures.dropna()}
    assert len(list((work / "out" / "pictures" / "base" / base).glob("0[01].png"))) == 2, "once for all trials"
    kept = (work / "out").glob(f"runs/*/{rows.key[1e-3].iloc[0]}/checkpoints/[12]-adapters/adapters.safetensors")
    assert len(list(kept)) == 2
    assert not list((work / "out").rglob("*.ckpt"))
    assert "not finite" in rows.reason[1e30] or "loss is" in rows.reason[1e30]
    files = {path: path.stat().st_mtime_ns for path in (work / "out").glob("trials/*.json")}
    assert sweep(*words, *vary, "--out", work / "out") == 1
    assert {path: path.stat().st_mtime_ns for path in (work / "out").glob("trials/*.json")} == files
    assert sweep(*words, *vary, "--retry", "--out", work / "out") == 1
    assert len(list((work / "out").glob("trials/*.json"))) == 2, "the failed one ran again, alone"


def test_hopeless_trials_are_stopped_early(work, words):
    pytest.importorskip("ray.tune")
    vary = ["lr=1e-2,1e-7,1e-8", f"subject={work / 'a'}", "--scheduler", "asha", "--grace", 1]
    assert sweep(*words, *vary, "--out", work / "out") == 0
    rows = table(work / "out")
    judged = Results(work / "out")
    assert len(judged.rows) == 3 and set(rows.status) <= {"done", "stopped"}
    last = rows.groupby("key").step.max()
    assert all(
        last[row.key] == (1 if row.status == "stopped" else 2) for row in rows.itertuples() if row.step == last[row.key]
    )


def test_a_dry_run_writes_nothing(work, words, capsys):
    assert (
        sweep(*words, "route=attn2o-ffni,resi-reso", f"subject={work / 'a'}", "--out", work / "o", "--dry-run") is None
    )
    told = capsys.readouterr().out
    assert "route=resi-reso" in told and "2 trials in 1 groups" in told and "s per trial" in told
    assert not (work / "o").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["sed=1"], "'sed' cannot be varied; did you mean seed"),
        (["--retrry"], "unknown option --retrry; did you mean --retry"),
        (["seed=1", "seed=2"], "seed is given twice"),
        (["a.yaml", "b.yaml"], "expected one YAML file"),
    ],
)
def test_misspelt_words_are_refused_before_anything_is_written(work, words, more, message):
    with pytest.raises(InputError, match=message):
        sweep(*words, f"subject={work / 'a'}", *more, "--out", work / "out")
    assert not (work / "out").exists()
