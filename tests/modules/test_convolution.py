"""A convolution as one matrix product: the same numbers, chosen where it is faster."""

import pytest
import torch
from torch import nn

from ldm.modules.convolution import Conv2d
from tests.helpers import assert_close_to


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels last"])
@pytest.mark.parametrize(
    "kernel, stride, padding, size", [(3, 1, 1, (4, 6)), (3, 2, 1, (8, 6)), (1, 1, 0, (5, 3)), (3, 2, 1, (5, 7))]
)
def test_product_and_convolution_agree(kernel, stride, padding, size, layout):
    torch.manual_seed(0)
    layer = Conv2d(6, 10, kernel, stride=stride, padding=padding)
    x = torch.randn(2, 6, *size).to(memory_format=layout).requires_grad_()
    results = [layer.as_product(x), nn.Conv2d.forward(layer, x)]
    assert_close_to(*results, 1e-6)
    weights = torch.randn(results[0].shape)
    gradients = [torch.autograd.grad((y * weights).sum(), [x, layer.weight, layer.bias]) for y in results]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close_to(ours, theirs, 1e-5)


def test_half_precision():
    torch.manual_seed(0)
    layer, x = Conv2d(6, 10, 3, padding=1), torch.randn(1, 6, 4, 4)
    expected = layer.as_product(x)
    halved = layer.bfloat16().as_product(x.bfloat16())
    assert halved.dtype == torch.bfloat16
    assert_close_to(halved.float(), expected, 0.02)


@pytest.mark.parametrize("batch, chosen", [(1, True), (2, True), (3, False)])
def test_few_pixels_of_many_channels_are_a_product(batch, chosen, monkeypatch):
    calls = []
    monkeypatch.setattr(Conv2d, "as_product", lambda self, x: calls.append(x.shape) or x)
    Conv2d(4, 64, 3, padding=1)(torch.zeros(batch, 4, 2, 2))
    assert bool(calls) is chosen
