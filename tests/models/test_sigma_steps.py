"""The spacings of sampling, levels without any signal, and samplers over sigmas in the table."""

import numpy as np
import pytest
import torch

from ldm.errors import InputError
from ldm.models.diffusion.sampler_parts import Parts
from ldm.models.diffusion.samplers import SAMPLERS, keep_known, sampler
from ldm.models.diffusion.schedule import ddpm_buffers, zero_terminal
from ldm.models.diffusion.sigma_steps import sigma_steps
from ldm.modules.diffusionmodules.util import make_beta_schedule, make_ddim_timesteps
from tests.analytic import Model, exact_denoiser
from tests.helpers import assert_close_to

OVER_SIGMAS = ("euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2s_a", "lms")
BETAS = make_beta_schedule("linear", 1000, 0.00085, 0.012)


@pytest.mark.parametrize("spacing", ["uniform", "trailing", "karras"])
@pytest.mark.parametrize("name", OVER_SIGMAS)
def test_each_finds_the_one_picture_there_is(name, spacing):
    torch.manual_seed(0)
    model, x0 = Model(), torch.randn(2, 4, 8, 8)
    row = sampler(name)
    steps = row.steps(model.alphas_cumprod, 12, spacing=spacing)
    denoise = exact_denoiser(model, x0)
    result = row.function(lambda x, t: denoise(x, t, None), torch.randn_like(x0), steps, lambda: torch.randn_like(x0))
    assert_close_to(result, x0, 1e-3)


def test_trailing_ends_at_the_last_step():
    assert make_ddim_timesteps("trailing", 5, 1000).tolist() == [199, 399, 599, 799, 999]
    assert make_ddim_timesteps("trailing", 3, 1000).tolist() == [332, 666, 999]
    alphas_cumprod = Model().alphas_cumprod
    steps = sigma_steps(alphas_cumprod, 5, spacing="trailing")
    assert [steps.time(sigma) for sigma in steps.sigmas[:-1]] == [999, 799, 599, 399, 199]


def test_karras_spacing():
    steps = sigma_steps(Model().alphas_cumprod, 10, spacing="karras")
    ramp = np.linspace(14.614641 ** (1 / 7), 0.029167158 ** (1 / 7), 10) ** 7  # arXiv 2206.00364, eq. 5
    assert_close_to(steps.sigmas, [*ramp, 0.0], 1e-6)
    times = [steps.time(sigma) for sigma in steps.sigmas]
    assert times == sorted(times, reverse=True) and times[0] == 999 and times[-1] == 0


def test_what_cannot_be_sampled_is_refused():
    alphas_cumprod = Model().alphas_cumprod
    for name, message in (("euler", "unknown spacing 'quad'"), ("dpm_solver", "DPM-Solver spaces its steps uniformly")):
        with pytest.raises(InputError, match=message):
            sampler(name).steps(alphas_cumprod, 10, spacing="quad")
    with pytest.raises(InputError, match="unknown ddim_discretize 'karras'"):
        sampler("ddim").steps(alphas_cumprod, 10, spacing="karras")
    with pytest.raises(InputError, match="expected 1 to 1000"):
        sampler("heun").steps(alphas_cumprod, 0)
    with pytest.raises(InputError, match="eta is 2"):
        sampler("euler_a").steps(alphas_cumprod, 10, 2)
    with pytest.raises(InputError, match="Heun is deterministic, but eta is 0.5"):
        sampler("heun").steps(alphas_cumprod, 10, 0.5)


def test_ancestral_samplers_add_noise_unless_told_not_to():
    model, noise = Model(), torch.randn(1, 4, 8, 8)

    def run(name, eta, seed):
        torch.manual_seed(seed)
        row = SAMPLERS[name]
        steps = row.steps(model.alphas_cumprod, 8, eta)
        denoise = lambda x, t: model.apply_model(x, t, None)  # noqa: E731
        return row.function(denoise, noise, steps, lambda: torch.randn_like(noise))

    assert not torch.allclose(run("euler_a", None, 0), run("euler_a", None, 1))
    assert_close_to(run("euler_a", 0.0, 0), run("euler", None, 1), 1e-5)


@pytest.mark.parametrize("name", OVER_SIGMAS)
def test_masks_keep_what_is_known(name):
    torch.manual_seed(0)
    model, x0 = Model(), torch.randn(1, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    row, seen = sampler(name), []
    steps = row.steps(model.alphas_cumprod, 40)
    draw_noise = lambda: torch.randn_like(x0)  # noqa: E731
    denoise = lambda x, t: model.apply_model(x, t, None)  # noqa: E731
    result = row.function(
        denoise, draw_noise(), steps, draw_noise,
        Parts(keep_known(x0, mask, draw_noise), on_step=lambda i, total, x, x0: seen.append((i, total))),
    )  # fmt: skip
    assert seen == [(i, 40) for i in range(40)]
    near = (result - x0).abs()
    assert near[..., :4].mean() < 0.2 < near[..., 4:].mean()


def test_a_schedule_whose_last_step_has_no_signal():
    """arXiv 2305.08891, section 3.1: the first step stays, the last one is noise alone, in between it falls."""
    before, after = (ddpm_buffers(betas)["alphas_cumprod"] for betas in (BETAS, zero_terminal(BETAS)))
    assert_close_to(after[0], before[0], 1e-6)
    assert 0 < after[-1] < 1e-7 and (after[1:] < after[:-1]).all()
    steps = sigma_steps(after, 10, spacing="trailing")
    assert steps.sigmas[0] == pytest.approx(4096, rel=1e-3)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "heun"])
def test_sampling_from_no_signal_at_all(name):
    """A model of the velocity finds its picture from pure noise; rounding stays small."""
    torch.manual_seed(0)
    alphas_cumprod = ddpm_buffers(zero_terminal(BETAS))["alphas_cumprod"]
    picture = torch.randn(1, 4, 8, 8)
    row = sampler(name)

    def denoise(x, t):  # v = (a x - x_0) / s, turned into the noise
        a = alphas_cumprod[t.long()].sqrt().view(-1, 1, 1, 1)
        s = (1 - a**2).sqrt()
        return a * (a * x - picture) / s + s * x

    steps = row.steps(alphas_cumprod, 20, spacing="trailing")
    assert_close_to(row.function(denoise, torch.randn(1, 4, 8, 8), steps, lambda: torch.zeros(1)), picture, 0.05)
