"""FID and KID against their formulas."""

import numpy as np
import pytest
import torch

from ldm.errors import InputError
from ldm.evaluate.distances import distances


def sets(n: int = 50, d: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, d, generator=generator)
    return a, a @ torch.diag(torch.tensor([2.0, 1.0, 1.0])) + torch.tensor([1.0, 0.0, -2.0])


def test_fid_of_two_gaussians_is_the_frechet_distance():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = sets()
    means = [x.double().mean(0).numpy() for x in (a, b)]
    covs = [np.cov(x.double().numpy().T) for x in (a, b)]
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(
        covs[0] + covs[1] - 2 * linalg.sqrtm(covs[0] @ covs[1]).real
    )
    assert distances(a, b, subsets=1).fid == pytest.approx(expected, rel=1e-6)
    assert distances(a, a, subsets=1).fid == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_mmd_of_a_cubic_kernel():
    a, b = (x.double() for x in sets())
    found = distances(a, b, subsets=1, subset_size=10**6)
    assert found.subset_size == 49
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = [torch.randperm(50)[:49] for _ in range(2)]
    real, fake = b[rows[0]], a[rows[1]]
    within = []
    for x in (real, fake):
        kernel = (x @ x.T / 3 + 1) ** 3
        within.append((kernel.sum() - kernel.trace()) / (49 * 48))
    expected = within[0] + within[1] - 2 * ((real @ fake.T / 3 + 1) ** 3).mean()
    assert found.kid == pytest.approx(expected.item(), rel=1e-6)


def test_global_random_numbers_stay_as_they_were():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    distances(*sets(10))
    assert torch.equal(torch.rand(1), expected)


def test_too_few_pictures_are_refused():
    with pytest.raises(InputError, match="at least 4 pictures of each kind, got 3 and 50"):
        distances(sets()[0][:3], sets()[1])
