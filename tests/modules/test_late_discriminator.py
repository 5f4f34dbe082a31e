"""The loss that asks its discriminator only once it takes part."""

import pytest
import torch

from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.contperceptual import LPIPSWithDiscriminator
from ldm.modules.losses.late import LateDiscriminator

pytest.importorskip("taming")
OPTIONS = {"disc_start": 3, "kl_weight": 0.1, "disc_weight": 0.5, "disc_num_layers": 1, "perceptual_weight": 0.0}


@pytest.mark.parametrize("step", [0, 2, 3])
@pytest.mark.parametrize("optimizer", [0, 1])
def test_gradients_are_those_of_the_published_loss(step, optimizer):
    gradients = []
    for kind in (LPIPSWithDiscriminator, LateDiscriminator):
        torch.manual_seed(0)
        loss, layer = kind(**OPTIONS), torch.nn.Conv2d(3, 3, 3, padding=1)
        pictures = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
        posterior = DiagonalGaussianDistribution(torch.full((2, 8, 4, 4), 0.1))
        value, _ = loss(pictures, layer(pictures), posterior, optimizer, step, last_layer=layer.weight)
        (value + 0 * layer.weight.sum()).backward()
        seen = loss.discriminator.parameters() if optimizer else layer.parameters()
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in seen])
    for published, late in zip(*gradients, strict=True):
        assert torch.allclose(published, late, atol=1e-6)


def test_the_discriminator_is_not_asked_before_it_starts():
    loss = LateDiscriminator(**OPTIONS)
    calls = []
    loss.discriminator.register_forward_hook(lambda *_: calls.append(1))
    pictures = torch.zeros(1, 3, 16, 16, requires_grad=True)
    posterior = DiagonalGaussianDistribution(torch.zeros(1, 8, 4, 4))
    for optimizer in (0, 1):
        loss(pictures, pictures * 1, posterior, optimizer, 2, last_layer=pictures)
    assert not calls
    loss(pictures, pictures * 1, posterior, 1, 3, last_layer=pictures)
    assert calls
