"""Small functions that several test files use."""

import torch


def assert_close_to(actual, expected, tol: float = 1e-4) -> None:
    """max|actual - expected| <= tol * max|expected|: element-wise rtol is too strict for entries near zero."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual - expected).abs().max().item()
    limit = tol * expected.abs().max().item()
    assert error <= limit, f"differs by {error:.3g}, allowed {limit:.3g}"
