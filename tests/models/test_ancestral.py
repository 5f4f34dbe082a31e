"""LDM's methods of model classes: sampling through every step, progressive denoising, log_images."""

import pytest
import torch

from ldm.errors import InputError
from tests.tuned_models import batch, model


def knowing(x0):
    """A model that knows the clean latents."""
    tuned = model()

    def predict(x, t, cond=None):
        a, s = tuned.level(t, x)
        return (x - a * x0) / s

    tuned.apply_model = predict
    return tuned


@pytest.mark.parametrize("parameterization", ["eps", "v"])
def test_the_mean_is_the_posterior_of_the_true_start(parameterization):
    x0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([5, 90])
    tuned = model(parameterization=parameterization)
    x = tuned.q_sample(x0, t, noise)
    tuned.apply_model = lambda x, t, c=None: tuned.prediction.target(x0, noise, *tuned.level(t, x))
    mean, variance, _ = tuned.p_mean_variance(x, t)
    expected, expected_variance, _ = tuned.q_posterior(x0, x, t)
    assert torch.allclose(mean, expected, atol=1e-4) and torch.equal(variance, expected_variance)


def test_every_step_leads_to_what_the_model_knows():
    x0 = torch.randn(2, 4, 8, 8)
    sample, way = knowing(x0).p_sample_loop(None, x0.shape, return_intermediates=True, verbose=False, log_every_t=25)
    assert torch.allclose(sample, x0, atol=0.05) and len(way) == 1 + 5
    again, estimates = knowing(x0).progressive_denoising(None, x0.shape, verbose=False, log_every_t=25)
    assert all(torch.allclose(one, x0, atol=0.05) for one in estimates) and len(estimates) == 4


def test_a_mask_keeps_what_is_known():
    x0, known = torch.randn(1, 4, 8, 8), torch.full((1, 4, 8, 8), 3.0)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    sample = knowing(x0).p_sample_loop(None, x0.shape, verbose=False, x0=known, mask=mask)
    assert (sample[..., :4] - 3).abs().max() < 0.5 and torch.allclose(sample[..., 4:], x0[..., 4:], atol=0.05)
    with pytest.raises(InputError, match="needs x0"):
        knowing(x0).p_sample_loop(None, x0.shape, mask=mask)


@pytest.mark.slow
def test_log_images_has_ldms_names():
    tuned = model(log_every_t=40)
    shown = tuned.log_images(batch(), ddim_steps=2, plot_denoise_rows=True)
    assert set(shown) == {
        "inputs", "reconstruction", "diffusion_row", "samples", "denoise_row", "samples_inpainting",
        "samples_outpainting", "progressive_row",
    }  # fmt: skip
    assert all(value.dim() == 4 and torch.isfinite(value).all() for value in shown.values())
    assert shown["inputs"].shape[0] == shown["samples"].shape[0] == 2
    some = tuned.log_images(batch(), ddim_steps=2, return_keys=["samples"], plot_progressive_rows=False)
    assert set(some) == {"samples"}
