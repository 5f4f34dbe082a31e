"""Muon: matrices take steps of orthogonal direction, all else those of AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
            matrices = [p for p in group["params"] if p.grad is not None and p.dim() >= 2]
            for alike in _by_shape(matrices):
                self._turn(alike, group["lr"], group["weight_decay"])
            for parameter in matrices:
                gradients[parameter], parameter.grad = parameter.grad, None
        super().step()
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        return loss

    def _turn(self, parameters: Sequence[Tensor], rate: float, decay: float) -> None:
        """One step of parameters that are matrices of one shape, in as few calls as there can be: on a GPU each costs
        more than its arithmetic."""
        states, gradients = [self._begun(parameter) for parameter in parameters], [p.grad for p in parameters]
        means = [state["momentum_buffer"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_lerp_(means, gradients, 1 - self.momentum)
        ahead = torch.stack(torch._foreach_lerp(gradients, means, self.momentum)).flatten(2)  # Nesterov's look ahead
        directions = [d.view_as(p) for d, p in zip(orthogonal(ahead), parameters, strict=True)]
        torch._foreach_mul_(parameters, 1 - rate * decay)
        torch._foreach_add_(parameters, directions, alpha=-0.2 * rate * math.sqrt(max(ahead.shape[1:])))

    def _begun(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:  # AdamW reads `step`
            state |= {"step": torch.tensor(0.0), "momentum_buffer": torch.zeros_like(parameter)}
        return state


def _by_shape(parameters: Sequence[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters of one shape, device and dtype: they are iterated together, which saves small products."""
    alike: dict[tuple, list[Tensor]] = {}
    for p in parameters:
        alike.setdefault((p.shape, p.device, p.dtype), []).append(p)
    return alike.values()


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Matrices [..., m, n] with the same singular vectors and singular values of 0.7 .. 1.2, by Newton-Schulz."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
