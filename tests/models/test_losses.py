"""The training loss of latent diffusion: equal to the published one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import InputError
from ldm.models.diffusion.losses import diffusion_loss, dreambooth_loss, simple_loss
from ldm.models.diffusion.objective import min_snr
from ldm.models.diffusion.prediction import PREDICTIONS
from ldm.models.diffusion.schedule import ddpm_buffers
from ldm.modules.diffusionmodules.util import make_beta_schedule
from tests.helpers import assert_close_to

BUFFERS = ddpm_buffers(make_beta_schedule("linear", 1000, linear_start=0.00085, linear_end=0.012))


@pytest.fixture(scope="module")
def tensors(golden):
    return load_file(golden / "training_loss" / "tensors.safetensors")


@pytest.fixture(scope="module")
def index(golden):
    return json.loads((golden / "training_loss" / "index.json").read_text())


def loss(pred, noise, t, kind="l2"):
    return diffusion_loss(simple_loss(pred, noise, kind), t, torch.zeros(1000), BUFFERS["lvlb_weights"])


def noisy(x0, t, noise):
    alpha = BUFFERS["alphas_cumprod"][t].view(-1, 1, 1, 1)
    return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise


def analytic_eps(x, t, context):
    """The model of samplers/index.json."""
    return torch.tanh(0.9 * x + 0.3 * context.mean((1, 2)).view(-1, 1, 1, 1)) * (0.5 + t / 2000).view(-1, 1, 1, 1)


def check(total, log, expected):
    assert_close_to(total, expected.get("total", expected.get("loss", expected.get("train/loss"))))
    for name in ("loss_simple", "loss_vlb", "loss"):
        assert_close_to(log[name], expected[f"train/{name}"])


def test_losses(tensors, index):
    assert len(index["cases"]) == 4
    for name, expected in index["cases"].items():
        kind, part = name.split(".")
        noise, t = tensors[f"{part}.noise"], tensors[f"{part}.t"]
        assert_close_to(noisy(tensors[f"{part}.x0"], t, noise), tensors[f"{part}.x_noisy"])
        check(*loss(tensors[f"{part}.model_output"], noise, t, kind), expected)


def test_dreambooth(tensors, index):
    parts = [loss(*(tensors[f"{part}.{name}"] for name in ("model_output", "noise", "t"))) for part in ("train", "reg")]
    for weight, expected in index["dreambooth_combination"]["by_reg_weight"].items():
        assert_close_to(dreambooth_loss(parts[0][0], parts[1][0], float(weight)), expected["loss"])
        for name, value in expected["logged"].items():
            assert_close_to(parts[0][1][name.removeprefix("train/")], value)


def test_seeded_forward(tensors, index):
    facts, x0 = index["seeded_forward"], tensors["train.x0"]
    torch.manual_seed(facts["torch_seed"])
    t, noise = torch.randint(0, 1000, (len(x0),)), torch.randn_like(x0)
    assert torch.equal(t, tensors["seeded_forward.t"]) and torch.equal(noise, tensors["seeded_forward.noise"])
    total, log = loss(analytic_eps(noisy(x0, t, noise), t, tensors["train.context"]), noise, t)
    check(total, log, {"loss": facts["loss"], **facts["log"]})


def test_step_from_images(tensors, index):
    x0 = 0.18215 * tensors["shared_step.image_bhwc"].permute(0, 3, 1, 2)
    t, noise = tensors["shared_step.t"], tensors["shared_step.noise"]
    total, _ = loss(analytic_eps(noisy(x0, t, noise), t, tensors["train.context"]), noise, t)
    assert_close_to(total, index["shared_step"]["loss"])
    assert_close_to(total, index["shared_step"]["recomputed_from_saved_t_noise"])


def test_every_golden_tensor_is_used(tensors):
    used = {f"{part}.{name}" for part in ("train", "reg") for name in ("x0", "noise", "t", "context", "model_output")}
    used |= {"train.x_noisy", "reg.x_noisy", "seeded_forward.t", "seeded_forward.noise"}
    assert used | {f"shared_step.{name}" for name in ("image_bhwc", "t", "noise")} == set(tensors)


def test_weights_and_logvar():
    per_sample, t = torch.tensor([1.0, 2.0]), torch.tensor([0, 2])
    logvar, lvlb = torch.tensor([0.0, 9.0, 1.0]), torch.tensor([3.0, 9.0, 5.0])
    total, log = diffusion_loss(per_sample, t, logvar, lvlb, 0.5, 0.1, learn_logvar=True)
    gamma = (1.0 + (2.0 / torch.e + 1.0)) / 2
    vlb = (3.0 + 10.0) / 2
    assert log["loss_gamma"].item() == pytest.approx(gamma)
    assert log["loss_vlb"].item() == pytest.approx(vlb)
    assert log["loss_simple"].item() == pytest.approx(1.5)
    assert log["logvar"].item() == pytest.approx(10 / 3)
    assert total.item() == pytest.approx(0.5 * gamma + 0.1 * vlb)
    assert "loss_gamma" not in diffusion_loss(per_sample, t, logvar, lvlb)[1]


def test_min_snr_weighs_each_sample():
    snr = torch.tensor([99.0, 5.0, 1.0])
    weights = {name: min_snr(snr, 5.0) * one.in_epsilon(snr) for name, one in PREDICTIONS.items()}
    assert weights["eps"].tolist() == pytest.approx([5 / 99, 1.0, 1.0], rel=1e-4)
    assert weights["x0"].tolist() == pytest.approx([5.0, 5.0, 1.0], rel=1e-4)
    assert weights["v"].tolist() == pytest.approx([5 / 100, 5 / 6, 1 / 2], rel=1e-4)
    per_sample, t = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 2])
    total, log = diffusion_loss(per_sample, t, torch.zeros(3), torch.zeros(3), weights["eps"])
    assert total.item() == pytest.approx((5 / 99 + 2 + 3) / 3, rel=1e-4)
    assert log["loss_simple"].item() == pytest.approx(2.0)


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_a_perfect_prediction_implies_the_noise_and_the_start(prediction):
    x0, noise = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.randn(2, 4, 4, 4, dtype=torch.float64)
    a = torch.tensor([0.9, 0.1], dtype=torch.float64).view(2, 1, 1, 1)
    s = (1 - a**2).sqrt()
    x_t, answer = a * x0 + s * noise, prediction.target(x0, noise, a, s)
    assert torch.allclose(prediction.to_x0(answer, x_t, a, s), x0)
    assert torch.allclose(prediction.to_epsilon(answer, x_t, a, s), noise)


def test_simple_loss_keeps_the_batch():
    a, b = torch.zeros(3, 2, 4, 4), torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 4, 4)
    assert simple_loss(a, b, "l2").tolist() == [0, 1, 4]
    assert simple_loss(a, b, "l1").tolist() == [0, 1, 2]


def test_refusal():
    with pytest.raises(InputError, match="unknown loss_type 'huber'"):
        simple_loss(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), "huber")
