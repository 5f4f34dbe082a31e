"""Metrics against values that follow from their definitions."""

import pytest
import torch

from ldm.evaluate.metrics import clip_i, clip_t, mean_and_error, pairwise_similarity, psnr, retrieval


def test_psnr_of_a_constant_error():
    black = torch.zeros(2, 3, 4, 4)
    assert psnr(black + torch.tensor([0.1, 0.01])[:, None, None, None], black).tolist() == pytest.approx(
        [20, 40], abs=1e-3
    )


def test_similarities_are_mean_cosines():
    a, b = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    assert clip_i(a, b).tolist() == pytest.approx([1 / 3, 0])
    assert pairwise_similarity(b).item() == pytest.approx(-1 / 3)
    assert clip_t(a, torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == pytest.approx([0.5**0.5, 1])


def test_retrieval_counts_the_own_candidate_among_the_nearest():
    queries = torch.eye(3)
    candidates = torch.tensor([[1.0, 0, 0], [0, 0, 1.0], [0, 1.0, 0.5]])
    assert retrieval(queries, candidates) == pytest.approx(1 / 3)
    assert retrieval(queries, candidates, k=2) == 1


def test_standard_error():
    assert mean_and_error(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx((2, (1 / 3) ** 0.5))
    assert mean_and_error(torch.tensor([4.0])) == (4, 0)
