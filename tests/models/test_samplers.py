"""The samplers against the published ones: any number of steps, any batch, guidance."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import InputError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.guidance import guided
from ldm.models.diffusion.samplers import draw
from tests.analytic import SAMPLERS, SHAPE, Model, exact_denoiser
from tests.helpers import assert_close_to


@pytest.fixture
def model():
    return Model()


@pytest.fixture(scope="module")
def index(golden):
    return json.loads((golden / "samplers" / "index.json").read_text())


@pytest.fixture(scope="module")
def inputs(golden):
    return load_file(golden / "samplers" / "inputs.safetensors")


@pytest.fixture(scope="module")
def outputs(golden):
    return load_file(golden / "samplers" / "outputs.safetensors")


CASES = [
    "ddim_S5_cfg1",
    "ddim_S20_cfg7.5",
    "ddim_S50_cfg7.5",
    "ddim_S20_cfg7.5_eta0.7",
    "ddim_S20_cfg7.5_inpaint",
    "plms_S5_cfg7.5",
    "plms_S20_cfg7.5",
    "dpm_S10_cfg7.5",
    "dpm_S20_cfg7.5",
]


def run_case(model, name, case, inputs, **more):
    if "seed" in case:
        torch.manual_seed(case["seed"])
    mask = dict(mask=inputs["mask"], x0=inputs["x0"]) if case["inpaint"] else {}
    return SAMPLERS[case["sampler"]](model).sample(
        case["S"],
        2,
        SHAPE,
        inputs["context"],
        eta=case.get("eta", 0.0),
        x_T=inputs["x_T"],
        unconditional_guidance_scale=case["scale"],
        unconditional_conditioning=inputs["uncond_context"],
        verbose=False,
        log_every_t=1,
        **mask,
        **more,
    )


@pytest.mark.parametrize("name", CASES)
def test_published_case(model, index, inputs, outputs, name):
    case = index["cases"][name]
    samples, intermediates = run_case(model, name, case, inputs)
    assert_close_to(samples, outputs[name], 1e-4)
    assert model.steps == pytest.approx(case["model_timesteps"], abs=1e-4)
    assert set(model.batches) == {case["model_batch"]} and len(model.steps) == case["n_model_calls"]
    if f"{name}.last_pred_x0" in outputs:
        assert_close_to(intermediates["pred_x0"][-1], outputs[f"{name}.last_pred_x0"], 1e-4)
    if name == index["trajectory"]["case"]:
        assert_close_to(torch.stack(intermediates["x_inter"]), outputs[f"trajectory.{name}.x"], 1e-4)
        assert_close_to(torch.stack(intermediates["pred_x0"]), outputs[f"trajectory.{name}.pred_x0"], 1e-4)


def test_image_to_image(model, index, inputs, outputs):
    name = "img2img_S20_enc12_cfg7.5"
    case = index["cases"][name]
    sampler = DDIMSampler(model)
    sampler.make_schedule(case["S"], verbose=False)
    t = torch.full((2,), case["t_enc"])
    encoded = sampler.stochastic_encode(inputs["x0"], t, noise=inputs["noise"])
    assert_close_to(encoded, outputs[case["encoded"]], 1e-4)
    decoded = sampler.decode(
        encoded, inputs["context"], case["t_enc"], case["scale"], inputs["uncond_context"], verbose=False
    )
    assert_close_to(decoded, outputs[name], 1e-4)
    assert model.steps == case["model_timesteps"]
    assert sampler.ddim_timesteps[case["t_enc"]] == case["encode_index_timestep"]


def test_encoding_to_training_steps(model, index, inputs, outputs):
    sampler = DDIMSampler(model)
    sampler.make_schedule(20, verbose=False)
    t = torch.tensor(index["stochastic_encode_original_steps"]["t"])
    encoded = sampler.stochastic_encode(inputs["x0"], t, use_original_steps=True, noise=inputs["noise"])
    assert_close_to(encoded, outputs["stochastic_encode_original_steps"], 1e-4)


def test_every_golden_tensor_has_a_test(outputs, index):
    stems = {name.removesuffix(".last_pred_x0") for name in outputs if not name.startswith("trajectory.")}
    others = {"img2img_S20_enc12_cfg7.5", "img2img_S20_enc12_cfg7.5.encoded", "stochastic_encode_original_steps"}
    assert stems == {*CASES, *others}
    assert set(index["cases"]) == {*CASES, "img2img_S20_enc12_cfg7.5"}


@pytest.mark.parametrize("name", CASES)
def test_order_of_random_draws(model, index, inputs, golden, monkeypatch, name):
    drawn = []
    real = torch.randn

    def randn(*args, **kwargs):
        drawn.append(real(*args, **kwargs))
        return drawn[-1]

    case = index["cases"][name]
    monkeypatch.setattr("ldm.models.diffusion.samplers.torch.randn", randn)
    run_case(model, name, case, inputs)
    assert len(drawn) == case["random_draws"]["n"]
    expected = load_file(golden / "samplers" / "random_draws.safetensors")
    if name in expected:
        assert torch.equal(torch.stack(drawn), expected[name])


# --- any number of steps


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 9, 300, 501, 600, 999, 1000])
def test_any_number_of_steps(model, kind, steps):
    samples, _ = SAMPLERS[kind](model).sample(steps, 2, SHAPE, verbose=False)
    assert samples.shape == (2, *SHAPE) and samples.isfinite().all()
    assert steps <= len(set(model.steps)) <= steps + steps // 2 + 1
    assert max(model.steps) <= 999 and min(model.steps) >= 0


@pytest.mark.parametrize(
    ("kind", "steps"), [("dpm", 1), *((kind, steps) for kind in SAMPLERS for steps in (10, 50, 1000))]
)
def test_a_perfect_model_leads_to_its_point(model, kind, steps):
    x0 = torch.linspace(-1, 1, 64).view(8, 8)
    model.apply_model = exact_denoiser(model, x0)
    torch.manual_seed(0)
    samples, _ = SAMPLERS[kind](model).sample(steps, 2, SHAPE, verbose=False)
    noise_left = (1 - model.alphas_cumprod[0]).sqrt().item()  # all end at the first noise level, not at none
    assert (samples - x0).abs().max() < 5 * noise_left


def test_the_solver_is_of_second_order(model):
    torch.manual_seed(0)
    x_T = torch.randn(2, *SHAPE)

    def end(kind, steps):
        return SAMPLERS[kind](model).sample(steps, 2, SHAPE, x_T=x_T, verbose=False)[0]

    limit = end("dpm", 1000)
    errors = [(end("dpm", steps) - limit).abs().max().item() for steps in (20, 40, 80)]
    assert errors[0] > 2.5 * errors[1] > 6 * errors[2]


@pytest.mark.parametrize("steps", [200, 50])
def test_other_schedules_than_a_thousand_steps(steps):
    for sampler in SAMPLERS.values():
        model = Model("cosine", 200)
        samples, _ = sampler(model).sample(steps, 1, SHAPE, verbose=False)
        assert samples.isfinite().all() and max(model.steps) <= 199


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_loop_runs_on_the_model_s_device_and_never_waits_for_it(model, kind):
    """Tensors on the meta device have no values: whatever reads one back to the host raises."""
    model.betas = model.betas.to("meta")
    model.apply_model = lambda x, t, cond: x * t.view(-1, 1, 1, 1)
    x0, mask = torch.zeros(2, *SHAPE), torch.ones(2, 1, 8, 8)
    samples, _ = SAMPLERS[kind](model).sample(20, 2, SHAPE, mask=mask, x0=x0, verbose=False)
    assert samples.device.type == "meta" and samples.dtype == torch.float32


# --- randomness


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(model, kind):
    context = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(1))
    x0 = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(3, 1, 8, 8)
    mask[..., :4] = 1

    def sample(which):
        generators = [torch.Generator().manual_seed(100 + i) for i in which]
        return SAMPLERS[kind](model).sample(
            6,
            len(which),
            SHAPE,
            context[which],
            eta=0.5 if kind == "ddim" else 0.0,
            mask=mask[which],
            x0=x0[which],
            generator=generators,
            verbose=False,
        )[0]

    state = torch.get_rng_state()
    together = sample([0, 1, 2])
    assert_close_to(sample([2]), together[2:], 1e-6)
    assert_close_to(sample([1, 0]), together[[1, 0]], 1e-6)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


def test_one_generator_for_the_whole_batch(model):
    runs = [
        DDIMSampler(model).sample(4, 2, SHAPE, eta=1.0, generator=torch.Generator().manual_seed(7), verbose=False)[0]
        for _ in range(2)
    ]
    assert torch.equal(*runs)
    torch.manual_seed(7)
    assert torch.equal(runs[0], DDIMSampler(model).sample(4, 2, SHAPE, eta=1.0, verbose=False)[0])


def test_temperature_and_noise_dropout():
    def run(**options):
        torch.manual_seed(0)
        return DDIMSampler(Model()).sample(4, 1, SHAPE, eta=1.0, verbose=False, **options)[0]

    torch.manual_seed(0)
    x_T = torch.randn(1, *SHAPE)
    plain = DDIMSampler(Model()).sample(4, 1, SHAPE, eta=1.0, temperature=0.0, x_T=x_T, verbose=False)[0]
    assert_close_to(run(temperature=0.0), plain, 1e-6)
    assert not torch.allclose(run(temperature=0.5), plain) and not torch.allclose(run(), run(noise_dropout=0.5))


def test_draw_one_per_sample():
    noise = draw((2, 3), "cpu", [torch.Generator().manual_seed(i) for i in (5, 6)])
    assert torch.equal(noise[1], torch.randn(3, generator=torch.Generator().manual_seed(6)))
    with pytest.raises(InputError, match="1 generators for a batch of 2"):
        draw((2, 3), "cpu", [torch.Generator()])


# --- the parts


def test_guidance_forms():
    torch.manual_seed(0)
    cond, uncond, x, t = torch.randn(2, 7, 24), torch.randn(2, 7, 24), torch.randn(2, *SHAPE), torch.tensor([3, 3])
    plain = guided(Model().apply_model, cond, uncond, 3.0)(x, t)
    model = Model()
    both = [{"c_crossattn": [c], "c_concat": [torch.zeros(2, 1, 8, 8)]} for c in (cond, uncond)]
    assert_close_to(guided(model.apply_model, *both, 3.0)(x, t), plain, 1e-6)
    assert model.batches == [4]

    seen = []
    listed = guided(lambda x, t, c: seen.append(c) or x, [cond], [uncond], 2.0)
    listed(x, t)
    assert torch.equal(seen[0][0], torch.cat([uncond, cond]))

    eps_u, eps_c = (Model().apply_model(x, t, c) for c in (uncond, cond))
    assert_close_to(plain, eps_u + 3.0 * (eps_c - eps_u), 1e-6)


@pytest.mark.parametrize(("uncond", "scale"), [(None, 7.5), (torch.zeros(2, 7, 24), 1.0)])
def test_no_guidance_is_one_conditional_call(model, uncond, scale):
    cond, x, t = torch.ones(2, 7, 24), torch.ones(2, *SHAPE), torch.tensor([3, 3])
    eps = guided(model.apply_model, cond, uncond, scale)(x, t)
    assert model.batches == [2] and torch.equal(eps, Model().apply_model(x, t, cond))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", sorted(SAMPLERS))
def test_a_model_may_write_its_answer_over_the_one_before(kind, scale):
    """As one does that replays CUDA graphs (`--compile reduce-overhead`)."""

    class Overwriting(Model):
        def apply_model(self, *inputs):
            eps = super().apply_model(*inputs)
            self.answer = self.answer.copy_(eps) if hasattr(self, "answer") else eps
            return self.answer

    def samples(model):
        torch.manual_seed(0)
        context = torch.ones(2, 7, 24)
        guidance = dict(unconditional_guidance_scale=scale, unconditional_conditioning=0 * context)
        return SAMPLERS[kind](model).sample(6, 2, SHAPE, context, **guidance, verbose=False)[0]

    assert torch.equal(samples(Overwriting()), samples(Model()))


def test_a_model_that_does_not_predict_noise_says_what_the_noise_is(model):
    model.predict_noise = model.apply_model
    model.apply_model = lambda x, t, cond: pytest.fail("samplers need the noise")
    torch.manual_seed(0)
    samples, _ = DDIMSampler(model).sample(3, 1, SHAPE, verbose=False)
    torch.manual_seed(0)
    assert torch.equal(samples, DDIMSampler(Model()).sample(3, 1, SHAPE, verbose=False)[0])
