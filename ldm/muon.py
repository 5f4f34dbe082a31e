"""Muon: matrices take steps of orthogonal direction, all else those of AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that draws singular values towards 1 fastest


class Muon(torch.optim.AdamW):
    """AdamW whose parameters of two or more dimensions follow Muon instead (Jordan et al. 2024, "Muon").

    A kernel of a convolution counts as the matrix [out, in * height * width]. Steps have the size that AdamW's have
    (0.2 of the learning rate in the root mean square, arXiv 2502.16982, Eq. 4), so that learning rates carry over.
    It iterates in the precision of the parameters; `torch.optim.Muon` takes matrices alone and iterates in bf16.
    momentum: of the mean of gradients, in 0 .. 1; further options are AdamW's. Raises `ValueError` for any other.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, **options: Any) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
        super().__init__(params, lr=lr, **options)
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Matrices first; then AdamW, which passes over parameters without a gradient, sees the others alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.dim() >= 2:
                    self._turn(parameter, group["lr"], group["weight_decay"])
                    gradients[parameter], parameter.grad = parameter.grad, None
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return loss

    def _turn(self, parameter: Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.tensor(0.0), "momentum_buffer": torch.zeros_like(parameter)}  # AdamW reads `step`
        state["step"] += 1
        mean = state["momentum_buffer"]
        mean.lerp_(parameter.grad, 1 - self.momentum)
        ahead = parameter.grad.lerp(mean, self.momentum).flatten(1)  # Nesterov's look ahead
        size = 0.2 * rate * math.sqrt(max(ahead.shape))
        parameter.mul_(1 - rate * decay).sub_(orthogonal(ahead).view_as(parameter), alpha=size)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix [m, n] with the same singular vectors and singular values of about 1 (0.7 .. 1.2), by Newton-Schulz."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
