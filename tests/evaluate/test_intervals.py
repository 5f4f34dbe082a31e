"""Bootstrap intervals against values that follow from their definition."""

import numpy as np
import pytest

from ldm.evaluate.intervals import bootstrap_weights, mean_interval


def test_every_resample_has_as_many_prompts_and_as_many_pictures_of_each():
    groups = ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    weights = bootstrap_weights(groups, draws=200)
    assert weights.shape == (200, 9) and (weights.sum(1) == 9).all()
    by_prompt = weights.reshape(200, 3, 3).sum(2)
    assert set(np.unique(by_prompt)) == {0, 3, 6, 9}
    assert np.array_equal(weights, bootstrap_weights(groups, draws=200))


def test_the_interval_of_a_plain_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(size=400)
    found = mean_interval(values, range(400))  # a prompt each: only prompts are drawn again
    error = values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)


def test_the_interval_agrees_with_that_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(2).exponential(size=40)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    found = mean_interval(values, ["one prompt"] * 40, draws=4000)
    assert found.low == pytest.approx(theirs.low, abs=0.02) and found.high == pytest.approx(theirs.high, abs=0.02)


def test_pictures_of_one_prompt_are_no_independent_values():
    prompts = np.repeat(np.random.default_rng(3).normal(size=10), 20)
    groups = [str(i) for i in range(10) for _ in range(20)]
    clustered, apart = mean_interval(prompts, groups), mean_interval(prompts, range(200))
    assert clustered.high - clustered.low > 3 * (apart.high - apart.low)


def test_pairs_are_of_one_prompt_and_of_two_pictures():
    pairs = np.array([[9.0, 1, 5, 5], [1, 9, 5, 5], [5, 5, 9, 3], [5, 5, 3, 9]])
    found = mean_interval(pairs, ["a", "a", "b", "b"])
    assert (found.mean, found.n) == (2, 2)
    assert (found.low, found.high) == (1, 3)  # only one prompt was drawn, twice
    with pytest.raises(ValueError, match="no prompt has two pictures"):
        mean_interval(pairs, ["a", "b", "c", "d"])


def test_a_single_value_has_no_interval():
    found = mean_interval(np.array([0.5]), ["a"])
    assert (found.mean, found.low, found.high, found.n) == (0.5, None, None, 1)
    assert str(found) == "0.500 (one value)"


def test_a_95_percent_interval_holds_the_truth_about_that_often():
    """DreamBooth's 25 prompts of 4 pictures, where half of the variance is of prompts, and where none is."""
    groups = [prompt for prompt in range(25) for _ in range(4)]
    for of_prompts, at_least, at_most in ((0.1, 0.9, 0.98), (0.0, 0.93, 1.0)):
        random, held = np.random.default_rng(0), 0
        for _ in range(200):
            values = of_prompts * random.normal(size=(25, 1)) + 0.1 * random.normal(size=(25, 4))
            found = mean_interval(values.ravel(), groups, draws=300)
            held += found.low <= 0 <= found.high
        assert at_least <= held / 200 <= at_most
