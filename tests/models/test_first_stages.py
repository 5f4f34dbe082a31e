"""Training of KL and VQ first stages at tiny width, their losses, the VQ and identity interfaces."""

import importlib.util
import json
import logging
import sys
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from ldm.config import instantiate_from_config
from ldm.errors import InputError
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel, VQModelInterface
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses.adversarial import hinge_d_loss, vanilla_d_loss
from ldm.modules.losses.vqperceptual import measure_perplexity
from ldm.train.callbacks import ImageLogger
from tests.helpers import assert_close_to

needs_taming = pytest.mark.skipif(
    importlib.util.find_spec("taming") is None, reason="the extra vq (taming-transformers) is not there"
)

NO_LOSS = {"target": "torch.nn.Identity"}
TINY = dict(ch=32, out_ch=3, ch_mult=[1, 1], num_res_blocks=1, attn_resolutions=[], in_channels=3, resolution=16)
KL = dict(TINY, z_channels=4, double_z=True)
VQ = dict(TINY, z_channels=3, double_z=False)


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are faster without sharing the work, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loss_config(kind, **params):
    target = {
        "kl": "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
        "vq": "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
    }[kind]
    params = {"disc_start": 0, "disc_num_layers": 1, "perceptual_weight": 0.0, **params}
    return {"target": target, "params": params}


def make(kind, loss=None, **options):
    torch.manual_seed(0)
    loss = loss or loss_config(kind)
    if kind == "kl":
        return AutoencoderKL(KL, loss, 4, monitor="val/rec_loss", **options)
    return VQModel(VQ, loss, n_embed=16, embed_dim=3, monitor="val/rec_loss", **options)


def pictures(n=4):
    generator = torch.Generator().manual_seed(5)
    return [{"image": torch.rand(16, 16, 3, generator=generator) * 2 - 1} for _ in range(n)]


def train(model, steps, tmp_path, validate=False):
    loader = torch.utils.data.DataLoader(pictures(), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=-1,
        max_steps=2 * steps,  # Lightning counts the steps of both optimizers
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, loader, loader if validate else None)
    return trainer


def rec_loss(model):
    batch = torch.utils.data.default_collate(pictures())
    with torch.no_grad():
        x = model.get_input(batch, "image")
        kwargs = {"sample_posterior": False} if isinstance(model, AutoencoderKL) else {}
        return (model.eval()(x, **kwargs)[0] - x).abs().mean().item()


@needs_taming
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_three_steps_of_training(kind, tmp_path):
    model = make(kind)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = train(model, 3, tmp_path, validate=True)
    assert model.batches_seen == 3 and trainer.global_step == 6
    unchanged = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    # LDM does not optimise the scale of the likelihood; the codebook's unused entries may stay.
    assert set(unchanged) <= {"loss.logvar"}
    expected = {"aeloss", "discloss", "train/rec_loss", "train/d_weight", "train/disc_loss"}
    assert expected | {"val/rec_loss", "val/aeloss", "val/discloss"} <= set(trainer.callback_metrics)
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert trainer.callback_metrics["train/d_weight"] > 0 and trainer.callback_metrics["train/disc_factor"] == 1
    assert trainer.callback_metrics["val/d_weight"] == 0, "no gradients, no adaptive weight"


@pytest.mark.slow
@needs_taming
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_training_learns(kind, tmp_path):
    model = make(kind, loss_config(kind, disc_start=10**6))
    model.learning_rate = 2e-3
    before = rec_loss(model)
    train(model.train(), 20, tmp_path)
    assert rec_loss(model) < 0.9 * before


@needs_taming
def test_the_discriminator_starts_at_disc_start(tmp_path):
    model = make("kl", loss_config("kl", disc_start=2))
    factors = []
    forward = model.loss.forward

    def watch(*args, **kwargs):
        loss, log = forward(*args, **kwargs)
        factors.extend([log["train/disc_factor"].item()] if "train/disc_factor" in log else [])
        return loss, log

    model.loss.forward = watch
    train(model, 4, tmp_path)
    assert factors == [0, 0, 1, 1]


@needs_taming
def test_two_optimizers_share_nothing():
    for kind in ("kl", "vq"):
        model = make(kind, **({"lr_g_factor": 2.0} if kind == "vq" else {}))
        model.learning_rate = 1e-3
        (first, second), _ = model.configure_optimizers()
        ids = [{id(p) for group in o.param_groups for p in group["params"]} for o in (first, second)]
        assert not ids[0] & ids[1]
        left = {name for name, p in model.named_parameters() if id(p) not in ids[0] | ids[1]}
        assert left == ({"loss.logvar"} if kind == "kl" else set())
        assert second.param_groups[0]["lr"] == (2e-3 if kind == "vq" else 1e-3)


@pytest.mark.slow
@needs_taming
def test_vq_with_schedule_averages_and_resizing(tmp_path):
    scheduler = {
        "target": "ldm.lr_scheduler.LambdaLinearScheduler",
        "params": dict(warm_up_steps=[10], cycle_lengths=[100], f_start=[0.0], f_max=[1.0], f_min=[1.0]),
    }
    model = make("vq", scheduler_config=scheduler, use_ema=True, batch_resize_range=[16, 48])
    sizes = []
    model.encoder.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
    trainer = train(model, 7, tmp_path, validate=True)
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == pytest.approx([0.7 * 4.5e-6] * 2)
    assert model.model_ema.num_updates == 7
    assert "val_ema/rec_loss" in trainer.callback_metrics
    assert set(sizes) <= {16, 32, 48} and sizes.count(48) >= 5, "the first five batches have the largest size"
    weight = model.encoder.conv_in.weight.detach().clone()
    with model.ema_scope():
        assert not torch.equal(model.encoder.conv_in.weight, weight)
    assert torch.equal(model.encoder.conv_in.weight, weight)
    shown = model.log_images(torch.utils.data.default_collate(pictures(2)), plot_ema=True)
    assert set(shown) == {"inputs", "reconstructions", "reconstructions_ema"}


@needs_taming
def test_averages_start_from_a_checkpoint_without_them(tmp_path):
    source = make("vq")
    save_file({k: v for k, v in source.state_dict().items() if not k.startswith("loss.")}, tmp_path / "vq.safetensors")
    torch.manual_seed(9)
    model = VQModel(VQ, loss_config("vq"), 16, 3, ckpt_path=str(tmp_path / "vq.safetensors"), use_ema=True)
    assert torch.equal(model.quantize.embedding.weight, source.quantize.embedding.weight)
    assert torch.equal(model.model_ema.encoderconv_inweight, source.encoder.conv_in.weight)


@needs_taming
def test_kl_checkpoint_without_loss_starts_the_loss_afresh(tmp_path):
    source = make("kl")
    save_file({k: v for k, v in source.state_dict().items() if not k.startswith("loss.")}, tmp_path / "kl.safetensors")
    loss = loss_config("kl", logvar_init=0.5)
    model = AutoencoderKL(KL, loss, 4, ckpt_path=str(tmp_path / "kl.safetensors"))
    assert model.loss.logvar.item() == 0.5
    assert 0.01 < model.loss.discriminator.main[0].weight.std() < 0.03, "N(0, 0.02), as for a new discriminator"


# --- the losses


@needs_taming
def test_kl_loss_without_discriminator():
    loss = make("kl", loss_config("kl", disc_start=10, kl_weight=0.1, pixelloss_weight=2.0, logvar_init=0.5)).loss
    torch.manual_seed(0)
    x, y = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16, requires_grad=True)
    posterior = DiagonalGaussianDistribution(torch.randn(2, 8, 8, 8))
    total, log = loss(x, y * 1.0, posterior, 0, 3, last_layer=y)
    expected = (2.0 * (x - y).abs() / torch.tensor(0.5).exp() + 0.5).sum() / 2 + 0.1 * posterior.kl().sum() / 2
    assert_close_to(total.detach(), expected.detach(), 1e-6)
    assert log["train/rec_loss"].item() == pytest.approx(2.0 * (x - y).abs().mean().item(), rel=1e-5)


@needs_taming
def test_adaptive_weight_balances_the_gradients():
    loss = make("vq", loss_config("vq", disc_weight=1.0, codebook_weight=0.5)).loss
    torch.manual_seed(0)
    x, layer = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16, requires_grad=True)
    total, log = loss(torch.tensor(3.0), x, layer.tanh(), 0, 0, last_layer=layer)
    rec = (x - layer.tanh()).abs().mean()
    adversarial = -loss.discriminator(layer.tanh()).mean()
    norms = [torch.autograd.grad(term, layer, retain_graph=True)[0].norm() for term in (rec, adversarial)]
    weight = norms[0] / (norms[1] + 1e-4)
    assert_close_to(log["train/d_weight"], weight, 1e-4)
    assert_close_to(total.detach(), (rec + weight * adversarial + 0.5 * 3.0).detach(), 1e-4)


class Distance(nn.Module):
    """Stands for LPIPS: [b, 3, h, w] twice to [b, 1, 1, 1]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, y):
        return self.weight * (x - y).square().mean(dim=(1, 2, 3), keepdim=True)


@needs_taming
@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_perceptual_network_is_passed_in(kind, caplog):
    part = {"target": "tests.models.test_first_stages.Distance"}
    with_network = make(kind, loss_config(kind, perceptual_weight=0.5, perceptual_loss=part))
    assert not caplog.records
    assert not with_network.loss.perceptual_loss.weight.requires_grad
    x, y = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    assert (with_network.loss.reconstruction(x, y) == 1.5).all()
    caplog.set_level(logging.WARNING)
    without = make(kind, loss_config(kind, perceptual_weight=0.5))
    assert len(caplog.records) == 1 and "perceptual" in caplog.text
    assert (without.loss.reconstruction(x, y) == 1.0).all()


def test_discriminator_losses():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert hinge_d_loss(real, fake).item() == pytest.approx(0.5 * (0.5 + 1.0))
    expected = nn.functional.binary_cross_entropy_with_logits
    both = expected(real, torch.ones(2)) + expected(fake, torch.zeros(2))
    assert vanilla_d_loss(real, fake).item() == pytest.approx(0.5 * both.item())


@needs_taming
def test_conditional_discriminator():
    loss = make("kl", loss_config("kl", disc_conditional=True, disc_in_channels=4)).loss
    x, cond = torch.randn(2, 3, 16, 16), torch.randn(2, 1, 16, 16)
    total, _ = loss(x, x, None, 1, 0, cond=cond)
    assert total.isfinite()
    with pytest.raises(InputError, match="given together"):
        loss(x, x, None, 1, 0)


def test_perplexity():
    assert measure_perplexity(torch.arange(8), 8)[0].item() == pytest.approx(8, rel=1e-4)
    perplexity, used = measure_perplexity(torch.zeros(2, 4, dtype=torch.long), 8)
    assert perplexity.item() == pytest.approx(1, rel=1e-4) and used == 1


# --- interfaces


@needs_taming
def test_vq_interface():
    torch.manual_seed(0)
    model = VQModelInterface(ddconfig=VQ, lossconfig=NO_LOSS, n_embed=16, embed_dim=3).eval()
    with torch.no_grad():
        z = model.encode(torch.randn(1, 3, 16, 16))
        assert z.shape == (1, 3, 8, 8)
        codes, _, (_, _, indices) = model.quantize(z)
        assert_close_to(model.decode(z), model.decode(codes, force_not_quantize=True), 1e-6)
        assert not torch.allclose(model.decode(z), model.decode(z, force_not_quantize=True))
    nearest = (z.permute(0, 2, 3, 1).reshape(-1, 1, 3) - model.quantize.embedding.weight).square().sum(-1).argmin(1)
    assert torch.equal(indices.flatten(), nearest)


def test_identity():
    x = torch.randn(1, 3, 4, 4)
    stage = IdentityFirstStage(anything=1)
    assert all(f(x) is x for f in (stage, stage.encode, stage.decode, stage.quantize))
    assert IdentityFirstStage(vq_interface=True).quantize(x)[0] is x


def test_inputs_and_pictures_for_the_log():
    model = make("kl", NO_LOSS)
    assert model.get_input({"m": torch.zeros(2, 5, 6, dtype=torch.uint8)}, "m").shape == (2, 1, 5, 6)
    batch = torch.utils.data.default_collate(pictures(2))
    assert torch.equal(model.get_input(batch, "image")[1, 2], batch["image"][1, :, :, 2])
    shown = model.log_images(batch)
    assert {name: value.shape for name, value in shown.items()} == dict.fromkeys(
        ("inputs", "reconstructions", "samples"), (2, 3, 16, 16)
    )
    assert set(model.log_images(batch, only_inputs=True)) == {"inputs"}
    for model in (make("kl", NO_LOSS, colorize_nlabels=7), make("kl", NO_LOSS)):
        coloured = model.to_rgb(torch.randn(2, 7, 4, 4))
        assert coloured.shape == (2, 3, 4, 4) and coloured.min() == -1 and coloured.max() == 1
    assert model.get_last_layer() is model.decoder.conv_out.weight


# --- refusals


def test_the_image_logger_shows_what_a_first_stage_makes_of_a_batch(tmp_path):
    model = make("kl", {"target": "torch.nn.Identity"})
    logger = ImageLogger(batch_frequency=1, max_images=2)
    logger.folders = [tmp_path]
    batch = next(iter(torch.utils.data.DataLoader(pictures(), batch_size=4)))
    state = torch.get_rng_state()
    trainer = SimpleNamespace(global_step=3, is_global_zero=True, loggers=[])
    logger.on_train_batch_end(trainer, model.train(), None, batch, 0)
    with Image.open(tmp_path / "000003.png") as picture:
        assert picture.size == (2 * 102 + 6, 3 * (27 + 102))  # 96 pixels each, below their names
        assert picture.text["prompt"] == "inputs | reconstructions | samples"
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_without_prompts_there_are_no_samples(tmp_path, caplog):
    logger = ImageLogger(batch_frequency=1)
    logger.folders = [tmp_path]
    trainer = SimpleNamespace(
        global_step=1, is_global_zero=True, loggers=[], datamodule=SimpleNamespace(captions=lambda training: [])
    )
    for trainer.global_step in (1, 2):
        logger.on_train_batch_end(trainer, torch.nn.Module(), None, None, 0)
    assert caplog.text.count("no sample pictures") == 1 and not list(tmp_path.iterdir())


def test_training_without_a_loss():
    with pytest.raises(InputError, match="cannot train a first stage"):
        make("kl", NO_LOSS).configure_optimizers()


@pytest.mark.parametrize(
    "build",
    [
        lambda: VQModel(VQ, NO_LOSS, 16, 3),
        lambda: AutoencoderKL(KL, loss_config("kl"), 4),
    ],
)
def test_missing_taming(monkeypatch, build):
    for name in [name for name in sys.modules if name.split(".")[0] == "taming"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "taming", None)
    with pytest.raises(InputError, match=r"taming.*\.\[vq\]") as error:
        build()
    assert "\n" not in str(error.value)


@needs_taming
@pytest.mark.parametrize(
    ("options", "message"),
    [({"disc_loss": "wgan"}, "unknown disc_loss 'wgan'"), ({"pixel_loss": "l3"}, "unknown pixel_loss 'l3'")],
)
def test_unknown_losses(options, message):
    with pytest.raises(InputError, match=message):
        make("vq", loss_config("vq", **options))


@pytest.mark.slow
@needs_taming
def test_published_first_stages_are_built(golden):
    published = json.loads((golden / "manifests" / "published_configs.json").read_text())
    configs = [c["model"] for name, c in published.items() if "/autoencoder/" in name]
    configs += [c["model"]["params"]["first_stage_config"] for name, c in published.items() if "latent-diff" in name]
    assert len(configs) == 11
    for config in configs:
        params = {key: value for key, value in config["params"].items() if key != "ckpt_path"}
        with torch.device("meta"):
            model = instantiate_from_config({"target": config["target"], "params": params})
            z = model.encode(torch.zeros(1, 3, 64, 64))
            z = z if isinstance(z, torch.Tensor) else z.mode()
            assert z.shape[1] == params["embed_dim"]
            assert model.decode(z).shape == (1, 3, 64, 64)
