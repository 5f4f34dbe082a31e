"""What the callback that compiles parts of a model changes: nothing but their speed."""

import pytest
import torch

from ldm.modules.diffusionmodules import model, openaimodel
from ldm.train.compiled import Compiled, upsample
from ldm.util import InputError


@pytest.mark.parametrize("module", [model.Upsample(4), openaimodel.Upsample(4, True)], ids=["first stage", "UNet"])
def test_upsampling_by_repetition_is_the_same(module):
    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected, actual = module(x), upsample(module, x)
    assert torch.equal(actual, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (expected, actual)]
    assert torch.allclose(*gradients, atol=1e-6)


def test_an_unknown_part_is_named():
    with pytest.raises(InputError, match="no such module"):
        Compiled(["decoder"]).setup(None, torch.nn.Linear(1, 1), "fit")
