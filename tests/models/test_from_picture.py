"""Sampling that begins at a picture: the same as LDM's `stochastic_encode` and `decode`, for every kind of steps."""

import pytest
import torch

from ldm.errors import InputError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.from_picture import last_steps
from ldm.models.diffusion.samplers import SAMPLERS
from tests.helpers import assert_close_to
from tests.tuned_models import model


@torch.no_grad()
def test_it_is_what_the_published_program_does():
    tuned, count, strength = model(), 10, 0.65
    sampler = DDIMSampler(tuned)
    sampler.make_schedule(count, ddim_eta=0.0, verbose=False)
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    text = tuned.get_learned_conditioning(["a cat", "a dog"])
    encoded = sampler.stochastic_encode(latents, torch.tensor([int(strength * count)] * 2), noise=noise)
    theirs = sampler.decode(encoded, text, int(strength * count))
    row = SAMPLERS["ddim"]
    steps, alpha_bar = last_steps(row.steps(tuned.alphas_cumprod, count), strength)
    begin = alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * noise
    assert_close_to(begin, encoded, 1e-5)
    ours = row.function(lambda x, t: tuned.apply_model(x, t, text), begin, steps, lambda: noise)
    assert_close_to(ours, theirs, 1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_back_the_noise_of_a_level(name):
    """With the true noise as prediction the picture comes back, from whatever level sampling begins at."""
    tuned, row = model(), SAMPLERS[name]
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    steps, alpha_bar = last_steps(row.steps(tuned.alphas_cumprod, 20), 0.5)

    def denoise(x, t):
        a, s = tuned.level(t.float(), x)
        return (x - a * latents) / s

    begin = alpha_bar**0.5 * latents + (1 - alpha_bar) ** 0.5 * noise
    found = row.function(denoise, begin, steps, lambda: torch.zeros_like(latents))
    assert (found - latents).abs().max() < 0.15 * (begin - latents).abs().max()


@pytest.mark.parametrize(("strength", "message"), [(1.2, "from 0 to 1"), (-0.1, "from 0 to 1"), (0.04, "leaves none")])
def test_strengths_that_are_refused(strength, message):
    steps = SAMPLERS["ddim"].steps(model().alphas_cumprod, 10)
    with pytest.raises(InputError, match=message):
        last_steps(steps, strength)
