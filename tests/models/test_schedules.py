"""Noise schedules, constants of the diffusion process, time-step embeddings: equal to the published ones."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import InputError
from ldm.models.diffusion.prediction import PREDICTIONS, prediction
from ldm.models.diffusion.process import DiffusionProcess
from ldm.models.diffusion.schedule import ddpm_buffers
from ldm.modules.diffusionmodules.util import (
    make_beta_schedule,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    timestep_embedding,
)
from tests.helpers import assert_close_to

TOLERANCE = 1e-6
SD = dict(linear_start=0.00085, linear_end=0.012)


@pytest.fixture(scope="module")
def tensors(golden):
    return load_file(golden / "schedules" / "schedules.safetensors")


@pytest.fixture(scope="module")
def index(golden):
    return json.loads((golden / "schedules" / "index.json").read_text())


def sd_buffers(v_posterior=0.0, parameterization="eps"):
    return ddpm_buffers(make_beta_schedule("linear", 1000, **SD), v_posterior, PREDICTIONS[parameterization])


def test_every_golden_tensor_has_a_test(tensors):
    groups = {name.split(".")[0] for name in tensors}
    assert groups == {"betas", "ddpm", "ddpm_x0_v0", "ddpm_cosine200", "q", "ddim_params", "temb", "ema"}


@pytest.mark.parametrize("name", ["linear", "cosine", "sqrt_linear", "sqrt"])
def test_betas(tensors, name):
    betas = make_beta_schedule(name, 1000, **SD)
    assert betas.dtype == np.float64
    assert_close_to(betas, tensors[f"betas.{name}"], TOLERANCE)


def test_default_betas(tensors):
    assert_close_to(make_beta_schedule("linear", 50), tensors["betas.linear_defaults_50"], TOLERANCE)


@pytest.mark.parametrize(
    ("prefix", "buffers"),
    [
        ("ddpm.", lambda: sd_buffers()),
        ("ddpm_x0_v0.3.", lambda: sd_buffers(0.3, "x0")),
        ("ddpm_cosine200.", lambda: ddpm_buffers(make_beta_schedule("cosine", 200))),
    ],
)
def test_buffers(tensors, prefix, buffers):
    expected = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    actual = buffers()
    assert len(expected) >= 3
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        assert_close_to(actual[name], value, TOLERANCE)


def test_buffer_names(index):
    assert list(sd_buffers()) == [*index["ddpm"]["in_state_dict"], "lvlb_weights"]


def test_the_forward_process_and_its_posterior(tensors):
    q = {name.removeprefix("q."): value for name, value in tensors.items() if name.startswith("q.")}
    process = DiffusionProcess()
    process.register_schedule(**SD)
    x0, xt, t, noise = (q.pop(name) for name in ("x0", "xt", "t", "noise"))
    actual = {
        "q_sample": process.q_sample(x0, t, noise),
        "predict_start_from_noise": process.predict_start_from_noise(xt, t, noise),
        **dict(zip(("mean", "variance", "log_variance"), process.q_mean_variance(x0, t), strict=True)),
        **dict(
            zip(
                ("posterior_mean", "posterior_variance", "posterior_log_variance_clipped"),
                process.q_posterior(x0, xt, t),
                strict=True,
            )
        ),
    }
    assert actual.keys() == q.keys()
    for name, expected in q.items():
        assert_close_to(actual[name], expected, TOLERANCE)


def test_ddim_timesteps(index):
    for name, expected in index["ddim_timesteps"].items():
        method, count = name.split(".")
        assert make_ddim_timesteps(method, int(count), 1000).tolist() == expected, name


def test_ddim_sampling_parameters(tensors):
    cases = {name.rsplit(".", 1)[0] for name in tensors if name.startswith("ddim_params.")}
    assert len(cases) == 12
    for case in cases:
        _, method, count, eta = case.split(".", 3)
        steps = make_ddim_timesteps(method, int(count[1:]), 1000)
        made = make_ddim_sampling_parameters(sd_buffers()["alphas_cumprod"], steps, float(eta.removeprefix("eta")))
        for name, value in zip(("sigmas", "alphas", "alphas_prev"), made, strict=True):
            assert value.dtype == tensors[f"{case}.{name}"].dtype
            assert_close_to(value, tensors[f"{case}.{name}"], TOLERANCE)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 200, 1000])
def test_ddim_timesteps_of_any_number(total):
    for count in range(1, total + 1):
        steps = make_ddim_timesteps("uniform", count, total)
        assert len(steps) >= count
        assert steps[0] >= 0 and steps[-1] < total
        assert (np.diff(steps) > 0).all(), "distinct and ascending"
        published = np.arange(0, total, total // count) + 1
        if published[-1] < total:
            assert steps.tolist() == published.tolist(), "where the published formula is valid, its numbers"
        steps = make_ddim_timesteps("quad", count, total)
        assert len(steps) == count
        assert steps[0] >= 0 and steps[-1] < total and (np.diff(steps) >= 0).all()


def test_ddim_timesteps_above_half_of_the_schedule():
    assert make_ddim_timesteps("uniform", 1000, 1000).tolist() == list(range(1000))
    for count in (501, 600, 999):
        steps = make_ddim_timesteps("uniform", count, 1000)
        assert len(steps) == count and steps[0] == 1 and steps[-1] == 999


def test_time_step_embeddings(tensors):
    t, t_float = tensors["temb.timesteps"], tensors["temb.timesteps_float"]
    actual = {
        "dim32": timestep_embedding(t, 32),
        "dim33": timestep_embedding(t, 33),
        "dim320": timestep_embedding(t, 320),
        "float_dim32": timestep_embedding(t_float, 32),
        "dim32_period100": timestep_embedding(t, 32, max_period=100),
        "repeat_only_dim4": timestep_embedding(t, 4, repeat_only=True),
    }
    expected = {name.removeprefix("temb."): v for name, v in tensors.items() if name.startswith("temb.")}
    assert actual.keys() == expected.keys() - {"timesteps", "timesteps_float"}
    for name, value in actual.items():
        # Processors round exp() to one bit or the other, and step 999 makes 6e-5 of a frequency's last bit.
        assert_close_to(value, expected[name], 1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_beta_schedule("linaer", 10), "unknown beta_schedule 'linaer'"),
        (lambda: make_beta_schedule("linear", 0), "at least 1 step"),
        (lambda: make_ddim_timesteps("cubic", 10, 1000), "unknown ddim_discretize 'cubic'"),
        (lambda: make_ddim_timesteps("uniform", 0, 1000), "expected 1 to 1000"),
        (lambda: make_ddim_timesteps("uniform", 1001, 1000), "expected 1 to 1000"),
        (lambda: make_ddim_sampling_parameters(torch.ones(5), np.arange(5), 1.5), "eta is 1.5"),
        (lambda: make_ddim_sampling_parameters(torch.ones(5), np.arange(5), -0.1), "eta is -0.1"),
        (lambda: ddpm_buffers(np.array([0.1, 1.0])), "between 0 and 1"),
        (lambda: ddpm_buffers(np.array([])), "between 0 and 1"),
        (lambda: prediction("velocity"), "must be one of eps, x0, v, got 'velocity'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
