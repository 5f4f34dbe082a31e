"""SDXL against the published code: levels, denoiser, samplers, loss; the engine; names and shapes at full size."""

import json

import pytest
import torch

from ldm.config import instantiate_from_config, load_config, plain
from ldm.errors import InputError
from ldm.generate import Settings, generate
from ldm.interchange.layers import skeleton
from ldm.models.building import build_model
from ldm.models.diffusion import edm_samplers
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.conftest import ROOT
from tests.helpers import assert_close_to
from tests.reference import DISCRETIZATION, SGM, Drawn, index, of_sgm, tensors


@pytest.fixture(scope="module")
def data(golden):
    folder = golden / "sdxl"
    return folder, index(folder)


@pytest.fixture(scope="module")
def denoiser():
    scaling = {"target": SGM + "denoiser_scaling.EpsScaling"}
    return of_sgm(
        "denoiser.DiscreteDenoiser", num_idx=1000, scaling_config=scaling, discretization_config=DISCRETIZATION
    )


@pytest.fixture(scope="module")
def network(data):
    folder, about = data
    unet = UNetModel(**about["unet"]["constructor"]).eval().requires_grad_(False)
    unet.load_state_dict(tensors(folder / "unet.safetensors"))
    return lambda x, t, c: unet(x, t, c["crossattn"], c["vector"])


def analytic(x, t, c):
    shift = 0.3 * c["crossattn"].mean(dim=(1, 2)) + 0.2 * c["vector"].mean(dim=1)
    return torch.tanh(0.9 * x + shift.view(-1, 1, 1, 1)) * (0.5 + t.float() / 2000).view(-1, 1, 1, 1)


def test_levels(data, denoiser):
    t = tensors(data[0] / "denoiser.safetensors")
    assert_close_to(denoiser.sigmas, t["sigmas"], 1e-6)
    assert torch.equal(denoiser.sigma_to_idx(t["query_sigma"]), t["query_index"])
    assert_close_to(denoiser.possibly_quantize_sigma(t["query_sigma"]), t["query_quantized"], 1e-6)
    discretization = instantiate_from_config(DISCRETIZATION)
    counts = [int(name.split(".")[1]) for name in t if name.startswith("sampling_sigmas.")]
    assert len(counts) == 6
    for count in counts:
        assert_close_to(discretization(count), t[f"sampling_sigmas.{count}"], 1e-6)
    assert torch.equal(discretization(10, do_append_zero=False, flip=True), discretization(10)[:-1].flip(0))
    with pytest.raises(InputError, match="cannot sample in 1001 steps"):
        discretization(1001)


def test_denoiser(data, denoiser, network):
    t, io = tensors(data[0] / "denoiser.safetensors"), tensors(data[0] / "unet_io.safetensors")
    cond = {"crossattn": io["context"], "vector": io["y"]}
    assert_close_to(denoiser(network, t["denoise.x"], t["denoise.sigma"], cond), t["denoise.out"], 2e-4)


def test_samplers(data, denoiser, network, monkeypatch):
    folder, about = data
    inputs, outputs = tensors(folder / "sampler_inputs.safetensors"), tensors(folder / "sampler_outputs.safetensors")
    draws, of_text = (
        tensors(folder / "sampler_random_draws.safetensors"),
        tensors(folder / "conditioner_io.safetensors"),
    )
    for name, case in about["samplers"]["cases"].items():
        of_unet, seen = case["model"] != "analytic", []
        guider = {"target": SGM + "guiders.VanillaCFG", "params": {"scale": case["scale"]}}
        sampler = of_sgm(
            "sampling." + case["sampler"], num_steps=case["num_steps"], discretization_config=DISCRETIZATION,
            guider_config=None if case["scale"] == 1 else guider, device="cpu", verbose=False, **case["kwargs"],
        )  # fmt: skip
        sides = ("cond.", "uncond_zero.") if of_unet else ("", "uncond_")
        names = (
            {"crossattn": "crossattn", "vector": "vector"} if of_unet else {"crossattn": "context", "vector": "vector"}
        )
        rows, source = (slice(1, 2), of_text) if of_unet else (slice(None), inputs)
        cond, uncond = ({kind: source[side + held][rows] for kind, held in names.items()} for side in sides)
        x = inputs["unet.x_T" if of_unet else "x_T"]

        def told(x, t, c, of_unet=of_unet, seen=seen):
            seen.append(t[0].item())
            return network(x, t, c) if of_unet else analytic(x, t, c)

        with monkeypatch.context() as patch:
            if name in draws:
                patch.setattr(edm_samplers.torch, "randn_like", Drawn(draws[name]))
            result = sampler(lambda x, sigma, c, told=told: denoiser(told, x, sigma, c), x, cond, uc=uncond)
        assert_close_to(result, outputs[case["output"]], 1e-3 if of_unet else 1e-4)
        assert seen == case["model_timesteps"]
        assert torch.equal(x, inputs["unet.x_T" if of_unet else "x_T"])  # unlike the published samplers


def test_linear_multistep_of_order_one_is_eulers_method(denoiser):
    x, cond = torch.randn(1, 4, 8, 8), {"crossattn": torch.randn(1, 7, 20), "vector": torch.randn(1, 60)}

    def sample(name, **more):
        sampler = of_sgm("sampling." + name, num_steps=20, discretization_config=DISCRETIZATION, **more)
        return sampler(lambda x, sigma, c: denoiser(analytic, x, sigma, c), x, cond)

    assert_close_to(sample("LinearMultistepSampler", order=1), sample("EulerEDMSampler"), 1e-5)
    exact = sample("HeunEDMSampler")
    errors = [(sample(name, **how) - exact).abs().max() for name, how in
              (("LinearMultistepSampler", {"order": 4}), ("EulerEDMSampler", {}))]  # fmt: skip
    assert errors[0] < errors[1]


def loss_config(kind, weighting="EpsWeighting"):
    return {
        "target": SGM + "loss.StandardDiffusionLoss",
        "params": {
            "loss_type": kind,
            "loss_weighting_config": {"target": SGM + f"loss_weighting.{weighting}"},
            "sigma_sampler_config": {
                "target": SGM + "sigma_sampling.DiscreteSampling",
                "params": {"num_idx": 1000, "discretization_config": DISCRETIZATION},
            },
        },
    }


def test_losses_and_the_order_of_draws(data, denoiser, network):
    folder, about = data
    t = tensors(folder / "training.safetensors")
    cond = {"crossattn": t["context"], "vector": t["vector"]}
    cases = [name for name in t if name.endswith(".loss_per_sample")]
    assert len(cases) == 3
    for case in cases:
        kind, of = case.split(".")[:2]
        loss = instantiate_from_config(loss_config(kind))
        torch.manual_seed(about["training"]["torch_seed"])
        value = loss(network if of == "unet" else analytic, denoiser, lambda _batch: cond, t["x0"], {})
        assert_close_to(value, t[case], 1e-4)
    torch.manual_seed(about["training"]["torch_seed"])
    assert torch.equal(torch.randint(0, 1000, (2,)), t["index"]) and torch.equal(torch.randn(2, 4, 16, 16), t["noise"])


def test_offset_noise_acts(denoiser):
    """The published class raises AttributeError here."""
    x, cond = torch.randn(2, 4, 8, 8), {"crossattn": torch.randn(2, 7, 20), "vector": torch.randn(2, 60)}
    config = loss_config("l2")
    config["params"]["offset_noise_level"] = 0.5
    values = []
    for one in (loss_config("l2"), config):
        torch.manual_seed(0)
        values.append(instantiate_from_config(one)(analytic, denoiser, lambda _batch: cond, x, {}))
    assert not torch.allclose(*values)


# --- the engine


def tiny_config(**params):
    """`configs/sdxl/sd_xl_base.yaml` with every width reduced."""
    model = plain(load_config(ROOT / "configs/sdxl/sd_xl_base.yaml").model)
    own = model["params"]
    own["network_config"]["params"] |= {
        "model_channels": 32, "num_res_blocks": 1, "num_head_channels": 16, "transformer_depth": [1, 1, 2],
        "context_dim": 20, "adm_in_channels": 12 + 6 * 8,
    }  # fmt: skip
    own["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1}
    entries = own["conditioner_config"]["params"]["emb_models"]
    entries[0]["target"] = "sgm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
    entries[0]["params"] = {"arch": {"width": 8, "heads": 2, "layers": 2}}
    entries[1]["params"]["arch"] = {"width": 12, "heads": 2, "layers": 2}
    for entry in entries[2:]:
        entry["params"]["outdim"] = 8
    own |= {"image_size": 16, **params}
    return {"model": model}


@pytest.fixture(scope="module")
def engine():
    return build_model(tiny_config(), None, random_seed=0).eval()


@pytest.mark.parametrize(
    ("config", "manifest"),
    [
        ("stable-diffusion/v2-inference", "sd_v2"),
        ("stable-diffusion/v2-inference-v", "sd_v2"),
        ("stable-diffusion/v2-inpainting-inference", "sd_v2_inpainting"),
        ("sdxl/sd_xl_base", "sdxl_base"),
    ],
)
def test_names_and_shapes_at_full_size(golden, config, manifest):
    expected = json.loads((golden / f"manifests/{manifest}_manifest.json").read_text())["keys"]
    state = skeleton(plain(load_config(ROOT / f"configs/{config}.yaml"))).state_dict()
    found = {name: (list(value.shape), str(value.dtype)) for name, value in state.items()}
    assert found == {name: (of["shape"], f"torch.{of['dtype']}") for name, of in expected.items()}


def test_the_engine_is_latent_diffusion_with_another_condition(engine):
    names = engine.state_dict()
    assert (
        "denoiser.sigmas" in names and "betas" not in names and "cond_stage_model" not in dict(engine.named_modules())
    )
    assert_close_to(engine.denoiser.sigmas, ((1 - engine.alphas_cumprod) / engine.alphas_cumprod).sqrt(), 1e-6)
    cond, uncond = engine.conditions(["a cat", "a dog"], (64, 48))
    assert cond["crossattn"].shape == (2, 77, 20) and cond["vector"].shape == (2, 60)
    assert not uncond["crossattn"].any() and torch.equal(uncond["vector"][:, 12:], cond["vector"][:, 12:])


@pytest.mark.parametrize(
    ("kind", "weighting"), [("l2", "EpsWeighting"), ("l1", "EpsWeighting"), ("l2", "UnitWeighting")]
)
def test_the_training_step_is_the_published_loss(engine, kind, weighting):
    """One is over the noise at time steps, the other over D(x, sigma): the same numbers from the same draws."""
    engine.loss_fn, engine.loss_type = instantiate_from_config(loss_config(kind, weighting)), kind
    batch = {"jpg": torch.rand(2, 3, 32, 32) * 2 - 1, "txt": ["a cat", "a dog"]}
    torch.manual_seed(3)
    x, cond, t, noise, x_noisy = engine.draw(batch)
    ours = engine.loss_of(engine.apply_model(x_noisy, t, cond), x, noise, t)[0]
    torch.manual_seed(3)
    theirs, logged = engine.shared_step(batch)
    assert_close_to(ours.detach(), theirs.detach(), 1e-4)
    assert logged["loss"] is theirs
    engine.loss_fn, engine.loss_type = None, "l2"


def test_sizes_are_conditions(engine):
    latents = torch.randn(1, 4, 16, 16)
    whole = engine.full_batch({"caption": ["a cat"]}, latents)
    assert whole["original_size_as_tuple"].tolist() == whole["target_size_as_tuple"].tolist() == [[32.0, 32.0]]
    own = engine.full_batch({"txt": ["a cat"], "crop_coords_top_left": torch.tensor([[5, 7]])}, latents)
    vectors = [engine.conditioner(batch)["vector"][0] for batch in (whole, own)]
    changed = (vectors[0] != vectors[1]).nonzero().flatten()
    assert 28 <= changed.min() and changed.max() < 44  # behind 12 of the text and 16 of the original size


def test_decoding_never_happens_in_half_precision(engine, monkeypatch):
    seen = []
    decode = engine.first_stage_model.decode
    monkeypatch.setattr(engine.first_stage_model, "decode", lambda z: (seen.append(z.dtype), decode(z))[1])
    expected = engine.decode_first_stage(torch.ones(1, 4, 8, 8))
    engine.first_stage_model.half()
    assert_close_to(engine.decode_first_stage(torch.ones(1, 4, 8, 8).half()), expected, 1e-2)
    assert seen == [torch.float32] * 2


def test_drawing_pictures(engine):
    pictures = generate(engine, ["a cat"], [1], Settings("euler", steps=2, scale=2.0))
    assert pictures.shape == (1, 3, 32, 32) and pictures.std() > 0
    again = generate(engine, ["a cat", "a cat"], [1, 2], Settings("euler", steps=2, scale=2.0))
    assert_close_to(again[0], pictures[0], 1e-4)


@pytest.mark.parametrize("spacing", ["karras", "trailing"])
@pytest.mark.parametrize("sampler", ["euler", "euler_a", "heun", "dpmpp_2m"])
def test_samplers_and_spacings(engine, sampler, spacing):
    """Each draws the same picture for a prompt alone and beside others; SDXL's own spacing is the trailing one."""
    settings = Settings(sampler, steps=3, scale=2.0, spacing=spacing)
    alone, batch = (generate(engine, ["a cat"] * n, range(1, n + 1), settings) for n in (1, 2))
    assert_close_to(batch[0], alone[0], 1e-4)
    uniform = generate(engine, ["a cat"], [1], Settings(sampler, steps=3, scale=2.0))
    assert torch.allclose(uniform, alone, atol=2e-2) == (spacing == "trailing")


def test_the_published_sampler_of_a_config(engine):
    """Ours over the noise at time steps, theirs over D(x, sigma): the same latents."""
    sampler = of_sgm("sampling.HeunEDMSampler", num_steps=4, discretization_config=DISCRETIZATION,
                     guider_config={"target": SGM + "guiders.VanillaCFG", "params": {"scale": 2.0}})  # fmt: skip
    engine.sampler = sampler
    cond, uncond = engine.conditions(["a cat"], (32, 32))
    torch.manual_seed(5)
    latents = engine.sample(cond, uncond, batch_size=1, shape=(4, 16, 16))
    engine.sampler = None
    torch.manual_seed(5)
    noise = torch.randn(1, 4, 16, 16)
    from ldm.models.diffusion.guidance import guided
    from ldm.models.diffusion.samplers import sampler as row

    heun = row("heun")
    with torch.no_grad():
        denoise = guided(engine.predict_noise, cond, uncond, 2.0)
        ours = heun.function(denoise, noise, heun.steps(engine.alphas_cumprod, 4), None)
    assert_close_to(ours, latents, 1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scaling_config": {"target": SGM + "denoiser_scaling.EDMScaling"}}, "with EpsScaling or VScaling"),
        ({"num_idx": 500}, "num_idx of the denoiser is 500, its discretization has 1000"),
    ],
)
def test_parts_that_do_not_go_together(change, message):
    config = tiny_config()
    config["model"]["params"]["denoiser_config"]["params"] |= change
    with pytest.raises(InputError, match=message):
        build_model(config, None)


def test_velocity(engine):
    config = tiny_config()
    config["model"]["params"]["denoiser_config"]["params"]["scaling_config"]["target"] = (
        SGM + "denoiser_scaling.VScaling"
    )
    model = build_model(config, None).eval()
    model.load_state_dict(engine.state_dict())
    assert model.parameterization == "v"
    x, cond = torch.randn(1, 4, 16, 16), engine.conditions(["a cat"], (32, 32))[0]
    sigma = model.denoiser.sigmas[[700]]
    with torch.no_grad():
        x0 = model.denoiser(model.model, x, sigma, cond)
        t = torch.tensor([700])
        eps = model.predict_noise(x / (1 + sigma**2).sqrt(), t, cond)
    assert_close_to(x - sigma * eps, x0, 1e-4)
