"""A tiny sweep: photographs of two subjects, class pictures, and the command line that trains on them."""

import pytest

from ldm.commands import Program
from tests.runs import TINY, pictures


@pytest.fixture
def work(tmp_path):
    for name, count, seed in (("a", 3, 0), ("b", 2, 5), ("class", 3, 1)):
        pictures(tmp_path / name, count, seed)
    return tmp_path


@pytest.fixture
def words(work):
    """The words of a command line, but for what varies and where it goes."""
    return [
        "--base", str(TINY), "--class_word", "dog", "--reg_data_root", str(work / "class"), "--accelerator", "cpu",
        "--max_steps", "2", "--first", "2", "--per_prompt", "1",
        "--per_class", "2", "--sample_steps", "2", "--network", "models/sd-mini/clip",
        "--together", "2", "--engine", "local",
        "--keep", "nothing",
    ]  # fmt: skip


def sweep(*words):
    return Program("sweep")([str(word) for word in words])


def table(out):
    """The rows of a sweep by what varies, without what differs from time to time."""
    import pandas

    frame = pandas.read_parquet(out / "results.parquet")
    changing = ["seconds", "seconds_training", "seconds_scoring", "peak_memory", "finished", "worker", "group", "trial"]
    return frame.drop(columns=[*changing, "config"])
