"""Stable Diffusion 2.x against the published code: the velocity in training and samplers, and the inpainting model."""

import pytest
import torch
from torch import nn

from ldm.config import get_obj_from_str
from ldm.errors import InputError
from ldm.models.diffusion import samplers
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from tests.analytic import SAMPLERS
from tests.helpers import assert_close_to
from tests.reference import IDENTITY, SD_BETAS, Drawn, index, tensors

TINY = {
    "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "attention_resolutions": [],
    "channel_mult": [1], "num_head_channels": 16, "context_dim": 18,
}  # fmt: skip


def analytic(x, t, cond, **_):
    """The model of the reference, read as the prediction."""
    context = cond["c_crossattn"][0] if isinstance(cond, dict) else cond
    context = context[0] if isinstance(context, list) else context
    shift = context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    return torch.tanh(0.9 * x + 0.3 * shift) * (0.5 + t.float() / 2000).view(-1, 1, 1, 1)


def latent_diffusion(unet=TINY, cls=LatentDiffusion, **params):
    target = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
    return cls(
        unet_config={"target": target, "params": unet},
        first_stage_config=IDENTITY,
        cond_stage_config=IDENTITY,
        scale_factor=0.18215,
        **{"conditioning_key": "crossattn", "use_ema": False, "channels": 4, **SD_BETAS, **params},
    )


@pytest.fixture(scope="module")
def data(golden):
    folder = golden / "sd2"
    return folder, index(folder)


@pytest.fixture(scope="module")
def v_model():
    model = latent_diffusion(parameterization="v").train()
    model.apply_model = analytic
    return model


@pytest.fixture(scope="module")
def unet_model(data):
    folder, about = data
    model = latent_diffusion(about["unet"]["constructor"], parameterization="v")
    model.model.diffusion_model.load_state_dict(tensors(folder / "unet.safetensors"))
    return model.eval().requires_grad_(False)


def test_relations_between_velocity_noise_and_picture(data, v_model):
    t = tensors(data[0] / "training.safetensors")
    x0, noise, steps, x = t["x0"], t["noise"], t["t"], t["x_noisy"]
    assert_close_to(v_model.q_sample(x0, steps, noise), x, 1e-5)
    assert_close_to(v_model.get_v(x0, noise, steps), t["v_target"], 1e-5)
    for of, v in (("v_target", t["v_target"]), ("model_output", t["model_output"])):
        assert_close_to(v_model.predict_start_from_z_and_v(x, steps, v), t[f"x0_from_{of}"], 1e-5)
        assert_close_to(v_model.predict_eps_from_z_and_v(x, steps, v), t[f"eps_from_{of}"], 1e-5)
    assert torch.equal(v_model.lvlb_weights, t["lvlb_weights_v"])


@pytest.mark.parametrize("case", ["v.l2", "v.l1", "v.elbo0.5", "v.logvar0.3", "eps.l2"])
def test_losses(data, case):
    folder, about = data
    t, expected = tensors(folder / "training.safetensors"), about["training"]["cases"][case]
    model = latent_diffusion(**expected["kwargs"]).train()
    model.apply_model = analytic
    loss, logged = model.p_losses(t["x0"], t["context"], t["t"], noise=t["noise"])
    assert_close_to(loss.detach(), expected["total"], 1e-5)
    for name, value in logged.items():
        assert_close_to(value.detach(), expected[name], 1e-5)


def test_draws_come_in_the_published_order(data, v_model):
    folder, about = data
    t, expected = tensors(folder / "training.safetensors"), about["training"]["seeded_forward"]
    torch.manual_seed(expected["torch_seed"])
    assert_close_to(v_model(t["x0"], t["context"])[0].detach(), expected["loss"], 1e-5)
    torch.manual_seed(expected["torch_seed"])
    steps = v_model.draws.steps(1000, len(t["x0"]), torch.device("cpu"))
    assert torch.equal(steps, t["seeded_forward.t"])
    assert torch.equal(v_model.draws.normal_like(t["x0"]), t["seeded_forward.noise"])


def test_the_unets_loss(data, unet_model):
    folder, about = data
    io, t = tensors(folder / "unet_io.safetensors"), tensors(folder / "training.safetensors")
    loss, _ = unet_model.p_losses(io["x"], io["context"], io["timesteps"], noise=t["unet.noise"])
    assert_close_to(loss, about["training"]["unet_v_loss"]["loss"], 1e-4)


def cases(golden_index):
    return {
        name: case
        for name, case in golden_index["samplers"]["cases"].items()
        if "output" in case and "model" in case and "plms" not in name
    }


def test_samplers(data, v_model, unet_model, monkeypatch):
    folder, about = data
    inputs, outputs = tensors(folder / "sampler_inputs.safetensors"), tensors(folder / "sampler_outputs.safetensors")
    draws = tensors(folder / "sampler_random_draws.safetensors")
    eps_model = latent_diffusion(parameterization="eps")
    eps_model.apply_model = analytic
    assert len(cases(about)) == 12
    for case in cases(about).values():
        of_unet = case["model"] != "analytic"
        model = unet_model if of_unet else v_model if case["parameterization"] == "v" else eps_model
        prefix = "unet." if of_unet else ""
        x_T = inputs[f"{prefix}x_T"]
        recorded = draws.get(case["random_draws"].get("stored"))
        with monkeypatch.context() as patch:
            if recorded is not None:
                patch.setattr(samplers.torch, "randn", Drawn(recorded))
            result, _ = SAMPLERS[case["sampler"]](model).sample(
                case["S"],
                len(x_T),
                x_T.shape[1:],
                inputs[f"{prefix}context"],
                eta=case["eta"],
                x_T=x_T,
                unconditional_guidance_scale=case["scale"],
                unconditional_conditioning=inputs[f"{prefix}uncond_context"],
                verbose=False,
                **({"mask": inputs["mask"], "x0": inputs["x0"]} if case["inpaint"] else {}),
            )
        assert_close_to(result, outputs[case["output"]], 1e-3 if of_unet else 1e-4)


def test_img2img(data, v_model):
    folder, about = data
    case = about["samplers"]["cases"]["v_img2img_S20_t13"]
    inputs, outputs = tensors(folder / "sampler_inputs.safetensors"), tensors(folder / "sampler_outputs.safetensors")
    sampler = DDIMSampler(v_model)
    sampler.make_schedule(case["S"], ddim_eta=case["eta"], verbose=False)
    x = sampler.stochastic_encode(inputs["x0"], torch.full((2,), case["t_enc"]), noise=inputs["noise"])
    how = {"unconditional_guidance_scale": case["scale"], "unconditional_conditioning": inputs["uncond_context"]}
    result = sampler.decode(x, inputs["context"], case["t_enc"], **how, verbose=False)
    assert_close_to(result, outputs[case["output"]])


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_every_sampler_finds_the_picture_that_a_perfect_model_sees(name):
    """Where the network always predicts the velocity of one picture, the picture is what comes out; PLMS, too."""
    torch.manual_seed(0)
    picture = torch.randn(1, 4, 8, 8)
    model = latent_diffusion(parameterization="v")

    def perfect(x, t, cond):
        a, s = model.level(t, x)
        return (a * x - picture) / s

    model.apply_model = perfect
    row = samplers.sampler(name)
    steps = row.steps(model.alphas_cumprod, 20)
    noise = torch.randn(1, 4, 8, 8)
    result = row.function(lambda x, t: model.predict_noise(x, t), noise, steps, lambda: torch.randn(1, 4, 8, 8))
    assert_close_to(result, picture, 0.05 if name in ("ddim", "plms", "dpm_solver") else 1e-3)


# --- inpainting


class Pooling(nn.Module):
    """The first stage of the reference: 8 x 8 mean pooling, and the mean of the three as a fourth channel."""

    downsampling_factor = 8

    def encode(self, x):
        z = nn.functional.avg_pool2d(x, 8)
        z = torch.cat([z, z.mean(1, keepdim=True)], dim=1)
        return DiagonalGaussianDistribution(torch.cat([z, torch.full_like(z, -30.0)], dim=1), deterministic=True)


@pytest.fixture(scope="module")
def inpainting(data):
    folder, about = data
    model = latent_diffusion(
        about["unet"]["constructor"] | {"in_channels": 9},
        get_obj_from_str("ldm.models.diffusion.ddpm.LatentInpaintDiffusion"),
        parameterization="eps",
        conditioning_key="hybrid",
        finetune_keys=None,
        concat_keys=["mask", "masked_image"],
        masked_image_key="masked_image",
        cond_stage_key="txt",
    )
    weights = tensors(folder / "unet.safetensors") | tensors(folder / "unet_inpainting_first_conv.safetensors")
    model.model.diffusion_model.load_state_dict(weights)
    model.first_stage_model = Pooling()
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def batch(data):
    t = tensors(data[0] / "inpainting.safetensors")
    picture, mask = t["image"], t["mask"]
    last = {
        "image": picture, "mask": mask, "masked_image": picture * (mask < 0.5),
    }  # fmt: skip
    return {name: value.permute(0, 2, 3, 1) for name, value in last.items()} | {"txt": t["context"]}, t


def test_the_condition_of_inpainting(inpainting, batch):
    batch, t = batch
    latents, cond = inpainting.clean(batch)
    assert_close_to(latents, t["z"], 1e-5)
    assert_close_to(cond["c_concat"][0], t["c_concat"], 1e-5)
    assert torch.equal(cond["c_crossattn"][0], t["context"])


def test_the_mask_conditions_and_never_weighs_the_loss(data, inpainting, batch):
    batch, t = batch
    expected = data[1]["inpainting"]["loss"]["value"]
    loss, _ = inpainting.p_losses(t["z"], inpainting.clean(batch)[1], t["t"], noise=t["noise"])
    assert_close_to(loss, expected, 1e-4)
    noisy = inpainting.q_sample(t["z"], t["t"], t["noise"])
    inpainting.draw = lambda _batch: (t["z"], inpainting.clean(batch)[1], t["t"], t["noise"], noisy)
    inpainting.log = inpainting.log_dict = lambda *_args, **_kwargs: None
    assert_close_to(inpainting.training_step(batch, 0), expected, 1e-4)
    del inpainting.draw


def test_sampling_with_hybrid_conditioning(inpainting, batch):
    _, t = batch
    sides = [{"c_concat": [t["c_concat"]], "c_crossattn": [t[side]]} for side in ("context", "uncond_context")]
    result, _ = DDIMSampler(inpainting).sample(
        4, 1, t["x_T"].shape[1:], sides[0], x_T=t["x_T"], verbose=False, eta=0.0,
        unconditional_guidance_scale=3.0, unconditional_conditioning=sides[1],
    )  # fmt: skip
    assert_close_to(result, t["ddim_S4_cfg3"], 1e-3)


def test_a_plain_checkpoint_starts_an_inpainting_model(tmp_path):
    plain = latent_diffusion()
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "plain.ckpt")
    inpaint = get_obj_from_str("ldm.models.diffusion.ddpm.LatentInpaintDiffusion")
    model = latent_diffusion({**TINY, "in_channels": 9}, inpaint, conditioning_key="hybrid",
                             ckpt_path=str(tmp_path / "plain.ckpt"))  # fmt: skip
    name = "model.diffusion_model.input_blocks.0.0.weight"
    first = model.state_dict()[name]
    assert torch.equal(first[:, :4], plain.state_dict()[name]) and not first[:, 4:].any()


def test_inpainting_is_where_ldm_has_it():
    from ldm.models.diffusion import ddpm

    assert ddpm.LatentInpaintDiffusion is get_obj_from_str("ldm.models.diffusion.ddpm.LatentInpaintDiffusion")
    assert not hasattr(ddpm, "LatentUpscaleDiffusion")


def test_what_inpainting_refuses():
    inpaint = get_obj_from_str("ldm.models.diffusion.ddpm.LatentInpaintDiffusion")
    with pytest.raises(InputError, match="conditioning_key must be hybrid"):
        latent_diffusion(cls=inpaint)
    with pytest.raises(InputError, match="masked_image_key 'x' must be among concat_keys"):
        latent_diffusion(cls=inpaint, conditioning_key="hybrid", masked_image_key="x")
    model = latent_diffusion({**TINY, "in_channels": 9}, inpaint, conditioning_key="hybrid", cond_stage_key="txt")
    model.first_stage_model = Pooling()
    with pytest.raises(InputError, match="the batch has no 'mask'"):
        model.clean({"image": torch.zeros(1, 16, 16, 3), "txt": torch.zeros(1, 7, 18)})
