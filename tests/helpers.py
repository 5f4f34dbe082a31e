"""Small functions that several test files use."""

import re
import shlex

import torch


def assert_close_to(actual, expected, tol: float = 1e-4) -> None:
    """max|actual - expected| <= tol * max|expected|: element-wise rtol is too strict for entries near zero."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual - expected).abs().max().item()
    limit = tol * expected.abs().max().item()
    assert error <= limit, f"differs by {error:.3g}, allowed {limit:.3g}"


def words_of(command: str) -> list[str]:
    """The words of a command whose placeholders (`<photos>`) are replaced, but for those in quotes."""
    filled = re.sub(r"'[^']*'|\"[^\"]*\"|<[^>]*>", lambda m: "one" if m[0][0] == "<" else m[0], command)
    assert not set("<>|&;()") & set(re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", filled)), "a shell reads more than words"
    return shlex.split(filled, comments=True)
