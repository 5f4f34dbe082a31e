"""LatentDiffusion: names at full size, seeded losses against the published ones, what learns, what is saved."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ldm.config import instantiate_from_config, load_config
from ldm.errors import InputError
from ldm.models.building import load_weights, skip_init
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.samplers import uniform_levels
from tests.conftest import ROOT
from tests.helpers import assert_close_to

TINY_UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 1,
        "channel_mult": [1],
        "num_heads": 2,
        "use_spatial_transformer": True,
        "context_dim": 24,
        "legacy": False,
    },
}
IDENTITY = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
PASS_THROUGH = {"target": "torch.nn.Identity"}


def tiny(unet=TINY_UNET, **params) -> LatentDiffusion:
    params = {"first_stage_config": IDENTITY, "cond_stage_config": PASS_THROUGH, "unet_config": unet} | params
    defaults = {"linear_start": 0.00085, "linear_end": 0.012, "conditioning_key": "crossattn", "use_ema": False}
    return LatentDiffusion(**defaults | {"cond_stage_key": "caption"} | params)


class AnalyticNoise(nn.Module):
    """The noise model of the reference numbers, in place of a UNet."""

    def forward(self, x, t, context=None, y=None):
        shift = 0.3 * context.mean(dim=(1, 2))[:, None, None, None]
        return torch.tanh(0.9 * x + shift) * (0.5 + t.float() / 2000)[:, None, None, None]


@pytest.fixture
def analytic():
    model = tiny()
    model.model.diffusion_model = AnalyticNoise()
    return model


@pytest.fixture(scope="module")
def reference(golden):
    folder = golden / "training_loss"
    return load_file(folder / "tensors.safetensors"), json.loads((folder / "index.json").read_text())


def test_the_released_names_and_shapes(golden):
    manifest = json.loads((golden / "manifests/sd_v1_manifest.json").read_text())["keys"]
    with skip_init():
        model = instantiate_from_config(load_config(ROOT / "configs/stable-diffusion/v1-inference.yaml").model)
    state = model.state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == {n: v["shape"] for n, v in manifest.items()}
    assert {n: str(v.dtype) for n, v in state.items()} == {n: f"torch.{v['dtype']}" for n, v in manifest.items()}


def answering(tensors, *parts):
    """A model whose UNet gives the recorded outputs."""
    model = tiny()
    recorded = torch.cat([tensors[f"{part}.model_output"] for part in parts])
    model.apply_model = lambda x, t, c: (
        recorded
        if torch.equal(x, torch.cat([tensors[f"{part}.x_noisy"] for part in parts]))
        else torch.full_like(x, torch.nan)
    )
    return model


@pytest.mark.parametrize("part", ["train", "reg"])
@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_p_losses(reference, kind, part):
    tensors, index = reference
    model = answering(tensors, part)
    model.loss_type = kind
    x0, context, t, noise = (tensors[f"{part}.{name}"] for name in ("x0", "context", "t", "noise"))
    loss, log = model.p_losses(x0, context, t, noise)
    expected = index["cases"][f"{kind}.{part}"]
    assert_close_to(loss, expected["total"])
    for name in ("train/loss_simple", "train/loss_vlb", "train/loss"):
        assert_close_to(log[name], expected[name])


def test_seeded_forward(reference, analytic):
    tensors, index = reference
    expected = index["seeded_forward"]
    torch.manual_seed(expected["torch_seed"])
    loss, _ = analytic(tensors["train.x0"], tensors["train.context"])
    assert_close_to(loss, expected["loss"])


def test_seeded_step_from_pictures(reference, analytic):
    tensors, index = reference
    expected = index["shared_step"]
    analytic.scale_factor = 0.18215
    torch.manual_seed(expected["torch_seed"])
    [(loss, _)] = analytic.losses([{"image": tensors["shared_step.image_bhwc"], "caption": tensors["train.context"]}])
    assert_close_to(loss, expected["loss"])


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_pair_of_subject_and_class(reference, weight, monkeypatch):
    tensors, index = reference
    model, logged = answering(tensors, "train", "reg"), {}
    names = ("x0", "context", "t", "noise", "x_noisy")
    drawn = iter([tuple(tensors[f"{p}.{n}"] for n in names) for p in ("train", "reg")])
    monkeypatch.setattr(model, "draw", lambda batch: next(drawn))
    monkeypatch.setattr(model, "log_dict", lambda values, **_: logged.update(values))
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    model.reg_weight = weight
    loss = model.training_step([{"image": torch.zeros(1)}, {}], 0)
    expected = index["dreambooth_combination"]["by_reg_weight"][str(weight)]
    assert_close_to(loss, expected["loss"])
    for name, value in expected["logged"].items():
        assert_close_to(logged[name], value)


def test_the_pair_is_one_call_of_the_unet():
    model, calls = tiny(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    model.log_dict = model.log = lambda *_, **__: None
    batch = {"image": torch.rand(2, 8, 8, 4), "caption": torch.randn(2, 5, 24)}
    assert model.training_step([batch, batch], 0).isfinite()
    assert len(calls) == 1


def one_step(model, device):
    """A training step and its backward pass on a device; what got a gradient."""
    model.log_dict = model.log = lambda *_, **__: None
    model.to(device)
    batch = {
        "image": torch.zeros(2, 8, 8, 4, device=device),
        "caption": torch.zeros(2, 5, 24, device=device),
        "mask": torch.ones(2, 8, 8, device=device),
    }
    model.training_step([batch, batch], 0).backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


ADAPTED = {"transformer_adp_config": [{"din": "attn2o", "dout": "ffni", "mid_dim": 4}]}
ADAPTED = {**TINY_UNET, "params": {**TINY_UNET["params"], "adapter_config": ADAPTED}}


@pytest.mark.parametrize("checkpointing", [False, True, "selective"])
def test_a_step_never_waits_for_the_device_and_differentiates_only_what_learns(checkpointing):
    """Tensors on the meta device have no values: whatever reads one back to the host raises."""
    unet = {**ADAPTED, "params": {**ADAPTED["params"], "use_checkpoint": checkpointing}}
    model = tiny(unet, train_level=["adapter"])
    assert one_step(model, "meta") == model.trainable_parameters().keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_never_waits_for_a_gpu():
    model = tiny(ADAPTED, train_level=["adapter"])
    one_step(model, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        one_step(model, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_learns_is_in_the_optimizer_once():
    adapters = {"transformer_adp_config": [{"din": "attn2o", "dout": "ffni", "mid_dim": 4}] * 2}
    unet = {**TINY_UNET, "params": {**TINY_UNET["params"], "adapter_config": adapters}}
    model = tiny(unet, train_level=["adapter"])
    model.learning_rate = 1e-3
    in_optimizer = [p for group in model.configure_optimizers().param_groups for p in group["params"]]
    assert len(in_optimizer) == len(set(map(id, in_optimizer))) == 2 * 4 * 4  # adapters, blocks, tensors
    assert {id(p) for p in in_optimizer} == {id(p) for p in model.parameters() if p.requires_grad}
    both = tiny(unet, train_level=["adapter", "unet"]).trainable_parameters()
    assert len(both) == len({id(p) for p in both.values()}) == len(list(model.model.parameters()))


def test_the_learning_rate_has_one_place():
    model = tiny(ADAPTED, train_level=["adapter"])
    model.optimizer_config, model.learning_rate = {"target": "torch.optim.AdamW", "params": {"lr": 1e-3}}, 1e-4
    with pytest.raises(InputError, match="set it there"):
        model.configure_optimizers()


def test_unknown_levels_and_families_are_refused():
    with pytest.raises(InputError, match="train_level has 'adaptor'"):
        tiny(train_level=["adaptor"])
    with pytest.raises(InputError, match="not a family"):
        tiny(tuning=[{"target": "torch.nn.Identity"}])


@pytest.mark.parametrize("key", [None, "concat", "crossattn", "hybrid", "adm"])
def test_conditioning_keys(key):
    params = dict(TINY_UNET["params"])
    if key in ("concat", "hybrid"):
        params["in_channels"] = 6
    if key not in ("crossattn", "hybrid"):
        params |= {"use_spatial_transformer": False, "context_dim": None}
    if key == "adm":
        params["num_classes"] = 10
    unconditional = {"cond_stage_config": "__is_unconditional__"} if key is None else {}
    model = tiny({**TINY_UNET, "params": params}, conditioning_key=key, **unconditional)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    picture, context = torch.randn(2, 2, 8, 8), torch.randn(2, 5, 24)
    cond = {
        None: None,
        "concat": picture,
        "crossattn": context,
        "hybrid": {"c_concat": [picture], "c_crossattn": [context]},
        "adm": torch.tensor([1, 9]),
    }[key]
    loss, _ = model.p_losses(x, cond, t)
    assert loss.isfinite()


@pytest.mark.parametrize("name", ["x0", "v"])
@pytest.mark.parametrize("steps", [[10, 900], [10.0, 900.0], [10.25, 899.5]], ids=str)
def test_samplers_are_given_the_noise_whatever_the_network_predicts(name, steps):
    model = tiny(parameterization=name)
    x0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor(steps)
    a, s = model.level(t, x0)
    model.apply_model = lambda x, t, c=None: model.prediction.target(x0, noise, a, s)
    assert_close_to(model.predict_noise(a * x0 + s * noise, t), noise, 1e-3)


def test_levels_between_steps_lie_between_those_of_the_steps():
    model = tiny()
    whole, like = torch.tensor([0, 10, 900]), torch.randn(3, 4, 8, 8)
    assert_close_to(torch.stack(model.level(whole.float(), like)), torch.stack(model.level(whole, like)), 1e-6)
    (a, s), (below, _), (above, _) = (model.level(t, like) for t in (whole + 0.5, whole, whole + 1))
    assert ((a < below) & (a > above)).all() and torch.allclose(a**2 + s**2, torch.ones_like(a))
    level = uniform_levels(model.alphas_cumprod, 7)[3]
    a, s = model.level(torch.tensor([level.t]), like)
    assert (a.item(), s.item()) == pytest.approx((level.alpha, level.sigma), rel=1e-5)


def test_velocity_under_its_published_names():
    model = tiny(parameterization="v")
    x0, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    x_t, v = model.q_sample(x0, t, noise), model.get_v(x0, noise, t)
    assert_close_to(model.predict_start_from_z_and_v(x_t, t, v), x0, 1e-4)
    assert_close_to(model.predict_eps_from_z_and_v(x_t, t, v), noise, 1e-4)
    model.apply_model = lambda x, t, cond: v
    loss, _ = model.p_losses(x0, None, t, noise)
    assert loss.item() < 1e-10


def test_logvar_learns_and_weights_losses():
    model = tiny(learn_logvar=True, logvar_init=0.5)
    model.learning_rate = 1e-3
    assert any(p is model.logvar for g in model.configure_optimizers().param_groups for p in g["params"])
    _, log = model.p_losses(torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24), torch.tensor([1, 2]))
    assert log["train/logvar"].item() == pytest.approx(0.5)


def test_ema_scope_swaps_and_restores():
    model = tiny(use_ema=True)
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    with torch.no_grad():
        for p in model.model.parameters():
            p.add_(1.0)
    with model.ema_scope():
        assert all(torch.equal(p, before[n]) for n, p in model.model.named_parameters())
    assert all(torch.equal(p, before[n] + 1.0) for n, p in model.model.named_parameters())


def test_a_frozen_stage_stays_in_evaluation_mode():
    frozen = {"target": "torch.nn.Sequential"}
    model = tiny(train_level=["unet"], cond_stage_config=frozen).train()
    assert model.training and model.model.training
    assert not model.first_stage_model.training and not model.cond_stage_model.training
    learning = {"target": "torch.nn.Linear", "params": {"in_features": 2, "out_features": 2}}
    assert tiny(train_level=["embeder"], cond_stage_config=learning).train().cond_stage_model.training


def test_both_spellings_of_the_text_encoder_load():
    encoder = {
        "target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "params": {"version": "models/sd-mini/clip"},
    }
    with skip_init():
        model, copy = tiny(cond_stage_config=encoder), tiny(cond_stage_config=encoder)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    released = model.state_dict()
    new = "cond_stage_model.transformer."
    present = {n.replace(new + "text_model.", new): v for n, v in released.items() if not n.endswith("position_ids")}
    assert any(n.startswith(new + "embeddings") for n in present)
    load_weights(copy, present, "present-day names")
    assert all(torch.equal(value, released[name]) for name, value in copy.state_dict().items())
