"""The KL first stage: equal to the published one, with its names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.errors import InputError
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.building import skip_init
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution, normal_kl
from tests.helpers import assert_close_to

NO_LOSS = {"target": "torch.nn.Identity"}
TINY = dict(ch=32, out_ch=3, ch_mult=[1, 1], num_res_blocks=1, attn_resolutions=[], in_channels=3, resolution=16)
TINY = {**TINY, "z_channels": 4, "double_z": True}


@pytest.fixture(scope="module")
def index(golden):
    return json.loads((golden / "autoencoder" / "index.json").read_text())


@pytest.fixture(scope="module")
def io(golden):
    return load_file(golden / "autoencoder" / "io.safetensors")


@pytest.fixture(scope="module")
def model(golden, index):
    path = golden / "autoencoder" / "weights.safetensors"
    return AutoencoderKL(index["ddconfig"], NO_LOSS, index["embed_dim"], ckpt_path=str(path)).eval()


@torch.no_grad()
def test_every_golden_tensor(model, io):
    posterior = model.encode(io["image"])
    wide = model.encode(io["image_nonsquare"])
    torch.manual_seed(31338)
    sample = posterior.sample()
    clamped = DiagonalGaussianDistribution(io["clamp_moments"])
    actual = {
        "encoder_out": model.encoder(io["image"]),
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "std": posterior.std,
        "mode": posterior.mode(),
        "decode_mode": model.decode(posterior.mode()),
        "decode_z_in": model.decode(io["z_in"]),
        "sample": sample,
        "sample_noise": (sample - posterior.mean) / posterior.std,
        "kl": posterior.kl(),
        "nll_of_sample": posterior.nll(io["sample"]),
        "mean_nonsquare": wide.mean,
        "logvar_nonsquare": wide.logvar,
        "decode_mode_nonsquare": model.decode(wide.mode()),
        "clamp_logvar": clamped.logvar,
        "clamp_std": clamped.std,
    }
    assert actual.keys() == io.keys() - {"image", "image_nonsquare", "z_in", "clamp_moments"}
    for name, value in actual.items():
        assert_close_to(value, io[name], 1e-4)


@torch.no_grad()
def test_forward(model, io):
    reconstruction, posterior = model(io["image"], sample_posterior=False)
    assert_close_to(reconstruction, io["decode_mode"], 1e-4)
    torch.manual_seed(31338)
    sampled, _ = model(io["image"])
    assert_close_to(sampled, model.decode(io["sample"]), 1e-4)


def test_parameters(model, index, golden):
    assert sum(p.numel() for p in model.parameters()) == index["n_params"]
    assert set(model.state_dict()) == set(load_file(golden / "autoencoder" / "weights.safetensors"))


def test_names_at_full_size(golden):
    manifest = json.loads((golden / "manifests" / "sd_v1_manifest.json").read_text())["keys"]
    prefix = "first_stage_model."
    expected = {k.removeprefix(prefix): v["shape"] for k, v in manifest.items() if k.startswith(prefix)}
    config = dict(TINY, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2, resolution=256)
    with torch.device("meta"):
        model = AutoencoderKL(config, NO_LOSS, 4)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == expected
    assert len(expected) == 248


@pytest.mark.parametrize("options", [{}, {"attn_type": "linear"}, {"attn_type": "none"}, {"use_linear_attn": True}])
@pytest.mark.parametrize("resample", [True, False])
def test_variants_keep_the_shapes(options, resample):
    config = dict(TINY, attn_resolutions=[8], resamp_with_conv=resample, **options)
    z = Encoder(**config)(torch.randn(1, 3, 16, 16))
    assert z.shape == (1, 8, 8, 8)
    x = Decoder(**config, tanh_out=True)(z[:, :4])
    assert x.shape == (1, 3, 16, 16) and x.abs().max() <= 1
    assert Decoder(**config, give_pre_end=True)(z[:, :4]).shape == (1, 32, 16, 16)


def test_a_narrow_decoder_has_a_mean_colour_only_with_few_groups():
    """32 groups of one channel each are normalized over the picture alone: behind them all pictures have one mean."""

    def means(groups):
        torch.manual_seed(0)
        decoder = Decoder(**TINY, norm_num_groups=groups)
        decoder.conv_out = torch.nn.Conv2d(32, 3, 1)
        before = []
        decoder.norm_out.register_forward_hook(lambda layer, inputs, output: before.append(output))
        with torch.no_grad():
            decoder(torch.randn(16, 4, 8, 8) + torch.randn(16, 4, 1, 1))
        return before[0].mean(dim=(2, 3))

    assert means(32).std(dim=0).max() < 1e-5
    assert means(4).std(dim=0).mean() > 0.05


def test_every_norm_has_the_groups_of_the_config():
    config = dict(TINY, attn_resolutions=[8, 16], norm_num_groups=4)
    norms = [m for part in (Encoder, Decoder) for m in part(**config).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {4} and len(norms) > 20


def test_names_of_attention_and_resampling():
    config = dict(TINY, attn_resolutions=[16])
    names = {name.rsplit(".", 2)[0] for name in Encoder(**config).state_dict()}
    assert {"down.0.attn.0", "mid.attn_1", "down.0.downsample"} <= names and "down.1.attn.0" not in names
    names = {name.rsplit(".", 2)[0] for name in Decoder(**config).state_dict()}
    assert {"up.0.attn.0", "up.0.attn.1", "up.1.upsample"} <= names and "up.1.attn.0" not in names


def test_downsampling_pads_right_and_bottom():
    from ldm.modules.diffusionmodules.model import Downsample

    layer = Downsample(1)
    layer.conv.weight.data.zero_()[0, 0, 0, 0] = 1  # picks the upper left place of the window
    layer.conv.bias.data.zero_()
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(layer(x), x[:, :, ::2, ::2])


def test_deterministic_distribution():
    gaussian = DiagonalGaussianDistribution(torch.randn(2, 8, 4, 4), deterministic=True)
    assert torch.equal(gaussian.sample(), gaussian.mean)
    assert gaussian.kl().tolist() == [0] and gaussian.nll(gaussian.mean).tolist() == [0]


def test_kl_between_gaussians():
    torch.manual_seed(0)
    a, b = (DiagonalGaussianDistribution(torch.randn(2, 8, 3, 3)) for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(a.mean, a.std), torch.distributions.Normal(b.mean, b.std)
    )
    assert_close_to(a.kl(b), expected.sum(dim=[1, 2, 3]), 1e-5)
    assert_close_to(normal_kl(a.mean, a.logvar, b.mean, b.logvar), expected, 1e-5)
    assert_close_to(normal_kl(a.mean, a.logvar, 0.0, 0.0).sum(dim=[1, 2, 3]), a.kl(), 1e-5)


def test_sample_with_a_generator_leaves_the_global_one_alone():
    gaussian = DiagonalGaussianDistribution(torch.zeros(1, 8, 4, 4))
    state = torch.get_rng_state()
    a = gaussian.sample(torch.Generator().manual_seed(3))
    b = gaussian.sample(torch.Generator().manual_seed(3))
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())


def test_checkpoint_with_ignored_keys_and_without_a_loss(tmp_path, model):
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    weights["loss.discriminator.main.0.weight"] = torch.zeros(1)
    save_file(weights, tmp_path / "kl.safetensors")
    config = dict(TINY, ch_mult=[1, 2], resolution=32, z_channels=4)
    loaded = AutoencoderKL(config, NO_LOSS, 4, ckpt_path=tmp_path / "kl.safetensors", ignore_keys=["decoder.conv_out"])
    assert torch.equal(loaded.encoder.conv_in.weight, model.encoder.conv_in.weight)
    assert not torch.equal(loaded.decoder.conv_out.weight, model.decoder.conv_out.weight)


def test_built_without_initialising(golden, index, io):
    weights = golden / "autoencoder" / "weights.safetensors"
    with skip_init():
        model = AutoencoderKL(index["ddconfig"], NO_LOSS, 4)
    model.init_from_ckpt(str(weights))
    with torch.no_grad():
        assert_close_to(model.eval().decode(io["z_in"]), io["decode_z_in"], 1e-4)


@pytest.mark.parametrize(
    ("ddconfig", "message"),
    [
        (dict(TINY, chanels=3), "ddconfig of the first stage: .*chanels"),
        ({k: v for k, v in TINY.items() if k != "ch"}, "ddconfig of the first stage: .*'ch'"),
        (dict(TINY, ch=20), "ddconfig of the first stage: .*divisible"),
        (dict(TINY, norm_num_groups=5), "ddconfig of the first stage: .*divisible"),
        (dict(TINY, attn_type="flash"), "unknown attn_type 'flash'"),
        (dict(TINY, double_z=False), "double_z: true"),
    ],
)
def test_refused_configurations(ddconfig, message):
    with pytest.raises(InputError, match=message) as error:
        AutoencoderKL(ddconfig, NO_LOSS, 4)
    assert "\n" not in str(error.value)


def test_refused_checkpoints(tmp_path, model):
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    config = dict(TINY, ch_mult=[1, 2], resolution=32)
    with pytest.raises(InputError, match="does not exist"):
        AutoencoderKL(config, NO_LOSS, 4, ckpt_path=str(tmp_path / "none.ckpt"))
    save_file({k: v for k, v in weights.items() if "conv_out" not in k}, tmp_path / "lacks.safetensors")
    with pytest.raises(InputError, match="conv_out"):
        AutoencoderKL(config, NO_LOSS, 4, ckpt_path=str(tmp_path / "lacks.safetensors"))
    save_file(weights, tmp_path / "kl.safetensors")
    with pytest.raises(InputError, match="shape"):
        AutoencoderKL(dict(config, ch_mult=[1, 1]), NO_LOSS, 4, ckpt_path=str(tmp_path / "kl.safetensors"))
