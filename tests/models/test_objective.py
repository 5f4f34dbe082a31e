"""The `loss` section: every choice against its formula, and the defaults as before."""

import math

import pytest
import torch

from ldm.errors import InputError
from ldm.models.diffusion.draws import Draws, SharedDraws
from ldm.models.diffusion.objective import Objective, min_snr, pyramid, soft_min_snr
from ldm.models.diffusion.prediction import PREDICTIONS
from tests.tuned_models import batch, model

SNR = torch.tensor([400.0, 5.0, 1.0, 0.01])
LATENTS = torch.zeros(4, 4, 8, 8)


def drawn(objective, seed=0, like=LATENTS):
    torch.manual_seed(seed)
    return objective.noise(Draws(), like)


def test_by_default_it_draws_as_ddpm_does():
    torch.manual_seed(0)
    expected = torch.randint(0, 100, (4,)), torch.randn(4, 4, 8, 8)
    torch.manual_seed(0)
    steps = Objective().steps(Draws(), 100, 4, torch.device("cpu"))
    noise = Objective().noise(Draws(), LATENTS)
    assert torch.equal(steps, expected[0]) and torch.equal(noise, expected[1])
    assert Objective().added(Draws(), noise) is noise and Objective().weight(SNR) == 1


@pytest.mark.parametrize(("name", "factor"), [("eps", 1), ("x0", SNR), ("v", SNR / (SNR + 1))])
@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("min_snr", [5 / 400, 1, 1, 1]),
        ("soft_min_snr", [5 / 405, 1 / 2, 5 / 6, 5 / 5.01]),
        ("debiased", [1 / 20, 1 / math.sqrt(5), 1, 10]),
    ],
)
def test_weights(weighting, expected, name, factor):
    objective = Objective({"weighting": weighting}, PREDICTIONS[name])
    assert torch.allclose(objective.weight(SNR), torch.tensor(expected) * factor)


def test_soft_min_snr_is_below_min_snr():
    assert (soft_min_snr(SNR, 5.0) < min_snr(SNR, 5.0)).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda t, snr: 0.2),
        ("exponential", lambda t, snr: 0.2 ** (t / 100)),
        ("snr", lambda t, snr: 0.8 / (1 + math.sqrt(1 / snr)) ** 2 + 0.2),
    ],
)
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_huber(kind, schedule, expected):
    objective = Objective({"type": kind, "huber_c": 0.2, "huber_schedule": schedule})
    error, t = torch.tensor([[0.01], [0.3], [2.0], [5.0]]), torch.tensor([0, 10, 50, 99])
    found = objective.errors(error, torch.zeros(4, 1), t, SNR, 100, "l2")
    for d, step, snr, value in zip(error.flatten().tolist(), t.tolist(), SNR.tolist(), found.flatten(), strict=True):
        c = expected(step, snr)
        wanted = 2 * (math.sqrt(d**2 + c**2) - c) * (c if kind == "huber" else 1)
        assert value.item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_noise_offset_moves_whole_channels():
    plain, shifted = drawn(Objective()), drawn(Objective({"noise_offset": 0.5}))
    offset = shifted - plain
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-6)
    many = drawn(Objective({"noise_offset": 0.5}), like=torch.zeros(400, 4, 8, 8)).mean((2, 3)).var().item()
    assert many == pytest.approx(0.25 + 1 / 64, rel=0.1)  # variance of a channel's mean


def test_input_perturbation_adds_what_is_not_the_target():
    objective = Objective({"input_perturbation": 0.1})
    noise = torch.randn(64, 4, 8, 8)
    more = objective.added(Draws(), noise) - noise
    assert more.std().item() == pytest.approx(0.1, rel=0.05) and abs((more * noise).mean().item()) < 0.01


def test_pyramid_noise_is_coarse_and_of_unit_variance():
    noise = torch.randn(32, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = pyramid(noise, Draws(), discount=0.8, levels=6)
    assert torch.allclose(found.flatten(1).std(1), torch.ones(32), atol=1e-5)
    neighbours = (found[..., 1:] * found[..., :-1]).mean().item()
    assert abs((noise[..., 1:] * noise[..., :-1]).mean().item()) < 0.02 and neighbours > 0.3


def test_time_steps_stay_in_their_range():
    objective = Objective({"timesteps": [20, 40]})
    steps = objective.steps(Draws(), 100, 500, torch.device("cpu"))
    assert steps.min() == 20 and steps.max() == 39
    assert Objective({"timesteps": [20, None]}).range_of(100) == (20, 100)


@pytest.mark.parametrize("mean", [-1.0, 0.0])
def test_logit_normal_time_steps(mean):
    objective = Objective({"timestep_sampling": "logit_normal", "logit_mean": mean, "logit_std": 0.5})
    torch.manual_seed(0)
    u = (objective.steps(Draws(), 1000, 4000, torch.device("cpu")).double() + 0.5) / 1000
    logits = (u / (1 - u)).log()
    assert logits.mean().item() == pytest.approx(mean, abs=0.05) and logits.std().item() == pytest.approx(0.5, rel=0.05)


def test_the_weight_of_class_pictures_changes_linearly():
    objective = Objective({"prior_weights": [[0, 1.0], [100, 0.5]]})
    assert [objective.prior_weight(step, 3.0) for step in (0, 50, 100, 900)] == [1.0, 0.75, 0.5, 0.5]
    assert Objective().prior_weight(7, 3.0) == 3.0


def test_processes_share_what_one_would_draw():
    objective = Objective({"noise_offset": 0.1, "pyramid_noise": 0.5, "timestep_sampling": "logit_normal"})

    def of(rows, pictures):
        torch.manual_seed(3)
        shared = SharedDraws()
        shared.begin(rows)
        steps = objective.steps(shared, 100, pictures, torch.device("cpu"))
        return steps, objective.noise(shared, torch.zeros(pictures, 4, 8, 8))

    whole = of(lambda n: (0, 4), 4)
    parts = [of(lambda n, first=first: (first, 4), 2) for first in (0, 2)]
    for number in (0, 1):
        assert torch.equal(torch.cat([part[number] for part in parts]), whole[number])


def test_a_model_trains_by_it_and_validates_as_always():
    usual, other = model(), model(loss={"noise_offset": 0.5, "timesteps": [90, 100], "weighting": "debiased"})
    for one, is_same in ((usual, True), (other, False)):
        one.train()
        torch.manual_seed(1)
        trained = one.draw(batch())
        one.eval()
        torch.manual_seed(1)
        validated = one.draw(batch())
        assert torch.equal(trained[3], validated[3]) is is_same
        assert (trained[2].min() >= 90) is not is_same or is_same
    loss, _ = other.losses([batch()])[0]
    loss.backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wieghting": "min_snr"}, "loss.wieghting is unknown; did you mean weighting"),
        ({"weighting": "snr"}, "loss.weighting must be none or min_snr"),
        ({"timesteps": [50, 20]}, "first < end"),
        ({"timesteps": [0, 2000]}, "loss.timesteps ends at 2000, but the model has 100"),
        ({"prior_weights": [[5, 1.0], [1, 2.0]]}, "in the order of steps"),
        ({"noise_offset": -0.1}, "loss.noise_offset must be"),
    ],
)
def test_what_it_refuses(settings, message):
    with pytest.raises(InputError, match=message):
        model(loss=settings)


def test_weights_are_not_said_twice():
    with pytest.raises(InputError, match="leave min_snr_gamma out"):
        model(min_snr_gamma=5.0, loss={"weighting": "debiased"})
