"""Muon: against torch's own on matrices, against AdamW on vectors, kernels as matrices, kept in checkpoints."""

import pytest
import torch
from torch import nn

from ldm.muon import Muon, orthogonal


def gradients(parameters, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        yield


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_orthogonal_keeps_the_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ orthogonal(matrix) @ v.T  # in the basis of the matrix's own singular vectors
    values = turned.diagonal()
    assert 0.6 < values[:-3].min() and values.max() < 1.3  # the smallest of all may need more iterations
    assert (turned - values.diag()).abs().max() < 1e-4


def test_matrices_go_as_in_torch():
    ours, theirs = (nn.Parameter(torch.ones(24, 40)) for _ in range(2))
    mine = Muon([ours], lr=0.01, weight_decay=0.1)
    peer = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in gradients([ours], 5):
        theirs.grad = ours.grad.clone()
        mine.step()
        peer.step()
    moved, expected = ours.detach() - 1, theirs.detach() - 1
    assert (moved - expected).norm() < 0.03 * expected.norm()  # torch iterates in bf16
    assert moved.std() == pytest.approx(0.01 * 0.2 * 5**0.5, rel=0.5)


def test_vectors_go_as_in_adamw_and_kernels_as_matrices():
    kernel, matrix = nn.Parameter(torch.ones(8, 4, 3, 3)), nn.Parameter(torch.ones(8, 36))
    ours, theirs = (nn.Parameter(torch.ones(10)) for _ in range(2))
    optimizers = [Muon([ours, kernel]), Muon([matrix]), torch.optim.AdamW([theirs], lr=1e-3)]
    for _ in gradients([kernel, ours], 4):
        matrix.grad, theirs.grad = kernel.grad.flatten(1), ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, theirs)
    assert torch.allclose(kernel.flatten(1), matrix) and not torch.equal(kernel, torch.ones_like(kernel))
    assert kernel.grad is not None


def test_it_goes_on_from_its_state():
    def run(pieces):
        parameters = [nn.Parameter(torch.ones(6, 5)), nn.Parameter(torch.ones(5))]
        state, steps = None, gradients(parameters, sum(pieces))
        for piece in pieces:
            optimizer = Muon(parameters, lr=0.01)
            if state:
                optimizer.load_state_dict(state)
            for _ in range(piece):
                next(steps)
                optimizer.step()
            state = optimizer.state_dict()
        return torch.cat([parameter.detach().flatten() for parameter in parameters])

    assert torch.equal(run([6]), run([2, 4]))


def test_it_learns_with_a_closure():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)), torch.randn(64, 8)
    y = x[:, :1].sin()

    def closure():
        optimizer.zero_grad()
        loss = (net(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer = Muon(net.parameters(), lr=0.1)
    losses = [optimizer.step(closure).item() for _ in range(100)]
    assert losses[-1] < 0.1 * losses[0]


def test_a_wrong_momentum():
    with pytest.raises(ValueError, match="momentum must be"):
        Muon([nn.Parameter(torch.ones(2))], momentum=1.0)
