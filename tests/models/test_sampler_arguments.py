"""What the samplers take beside a model: masks, callbacks, pictures to begin with; and what they refuse."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import InputError
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.samplers import Step, ddim, keep_known
from tests.analytic import SAMPLERS, SHAPE, Model, exact_denoiser
from tests.helpers import assert_close_to


@pytest.fixture
def model():
    return Model()


@pytest.fixture(scope="module")
def inputs(golden):
    return load_file(golden / "samplers" / "inputs.safetensors")


@pytest.mark.parametrize("kind", SAMPLERS)
def test_inpainting_keeps_what_is_known(model, kind):
    torch.manual_seed(0)
    x0, mask = torch.randn(2, *SHAPE), torch.zeros(2, 1, 8, 8)
    mask[..., :4] = 1
    model.apply_model = exact_denoiser(model, x0)
    samples, _ = SAMPLERS[kind](model).sample(20, 2, SHAPE, mask=mask, x0=x0, verbose=False)
    assert (samples - x0)[..., :4].abs().max() < 0.2

    everything, _ = SAMPLERS[kind](model).sample(20, 2, SHAPE, mask=torch.ones(2, 4, 8, 8), x0=x0, verbose=False)
    assert (everything - x0).abs().max() < 0.2


def test_known_places_are_noised_to_the_level():
    x0, noise = torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), 10.0)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 0.5]]]])
    blended = keep_known(x0, mask, lambda: noise)(torch.zeros(1, 1, 2, 2), 0.36)
    assert blended.flatten().tolist() == pytest.approx([0.6 * 2 + 0.8 * 10, 0, 0, 0.5 * (0.6 * 2 + 0.8 * 10)])


def test_quantised_predictions(model):
    model.first_stage_model = SimpleNamespace(quantize=lambda x: (x.round(), None, None))
    for sampler in SAMPLERS.values():
        _, way = sampler(model).sample(5, 1, SHAPE, quantize_x0=True, log_every_t=1, verbose=False)
        assert all(torch.equal(x, x.round()) for x in way["pred_x0"][1:])


def test_score_corrector(model):
    corrector = SimpleNamespace(modify_score=lambda model, eps, x, t, cond, factor: factor * eps)
    steps = [Step(500, 0.3, 0.9, 0.0)]
    x = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    sampler = DDIMSampler(model)
    doubled, _ = sampler.sample(
        1, 1, SHAPE, x_T=x, score_corrector=corrector, corrector_kwargs={"factor": 0.0}, verbose=False
    )
    silent = ddim(lambda x, t: torch.zeros_like(x), x, sampler.steps, lambda: torch.zeros_like(x))
    assert_close_to(doubled, silent, 1e-6)
    assert not torch.allclose(silent, ddim(lambda x, t: x, x, steps, lambda: torch.zeros_like(x)))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_callbacks_and_intermediates(model, kind):
    told, seen = [], []
    samples, way = SAMPLERS[kind](model).sample(
        10,
        1,
        SHAPE,
        callback=told.append,
        img_callback=lambda pred_x0, i: seen.append((i, pred_x0.shape)),
        log_every_t=4,
        verbose=False,
    )
    assert told == list(range(10)) and seen == [(i, (1, *SHAPE)) for i in range(10)]
    assert len(way["x_inter"]) == len(way["pred_x0"]) == 1 + 4  # the start; updates 0, 1, 5, 9
    assert torch.equal(way["x_inter"][-1], samples)


def test_progress_bar_only_when_verbose(model, capsys):
    for sampler in SAMPLERS.values():
        sampler(model).sample(3, 1, SHAPE, verbose=False)
        assert capsys.readouterr() == ("", "")
        sampler(model).sample(3, 1, SHAPE, verbose=True)
        out, err = capsys.readouterr()
        assert out == "" and err.count(sampler.__name__) and "3/3" in err


def test_arguments_without_effect_are_named(model, caplog):
    DDIMSampler(model).sample(2, 1, SHAPE, verbose=False, uncondtional_guidance_scale=7.5)
    assert "uncondtional_guidance_scale" in caplog.text


def test_no_gradients(model):
    cond = torch.zeros(1, 7, 24, requires_grad=True)
    assert not DDIMSampler(model).sample(2, 1, SHAPE, cond, verbose=False)[0].requires_grad


# --- pictures as a start


def test_encoding_to_the_last_step(model, inputs):
    sampler = DDIMSampler(model)
    sampler.make_schedule(20, verbose=False)
    last = sampler.stochastic_encode(inputs["x0"], torch.tensor([20, 20]), noise=inputs["noise"])
    alpha = model.alphas_cumprod[sampler.ddim_timesteps[-1]]
    assert_close_to(last, alpha.sqrt() * inputs["x0"] + (1 - alpha).sqrt() * inputs["noise"], 1e-6)
    sampler.decode(last, inputs["context"], 20, verbose=False)
    assert model.steps == sampler.ddim_timesteps[::-1].tolist()


def test_decoding_with_training_steps(model):
    x0 = torch.linspace(-1, 1, 64).view(1, 1, 8, 8).expand(1, *SHAPE)
    model.apply_model = exact_denoiser(model, x0)
    for eta in (0.0, 1.0):
        sampler = DDIMSampler(model)
        sampler.make_schedule(20, ddim_eta=eta, verbose=False)
        torch.manual_seed(0)
        encoded = sampler.stochastic_encode(x0, torch.tensor([300]), use_original_steps=True)
        decoded = sampler.decode(encoded, None, 301, use_original_steps=True, verbose=False)
        assert_close_to(decoded, x0, 1e-3)


def test_encoding_draws_from_the_generator(model):
    sampler = DDIMSampler(model)
    sampler.make_schedule(10, ddim_eta=1.0, verbose=False)

    def run():
        generators = [torch.Generator().manual_seed(4)]
        encoded = sampler.stochastic_encode(torch.zeros(1, *SHAPE), 5, generator=generators)
        return sampler.decode(encoded, None, 5, generator=generators, verbose=False)

    assert torch.equal(run(), run())


# --- refusals

CONTEXT = torch.zeros(2, 7, 24)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(S=0), "0 steps: expected 1 to 1000"),
        (dict(S=1001), "1001 steps: expected 1 to 1000"),
        (dict(eta=-1.0), "eta is -1.0"),
        (dict(eta=2.0), "eta is 2.0"),
        (dict(conditioning=CONTEXT[:1]), "conditioning is for 1 samples, batch_size is 2"),
        (dict(conditioning={"c_crossattn": [CONTEXT[:1]]}), "conditioning is for 1 samples, batch_size is 2"),
        (dict(mask=torch.ones(2, 1, 8, 8)), "needs x0"),
        (dict(mask=torch.ones(2, 1, 9, 8), x0=torch.ones(2, *SHAPE)), r"mask has shape \[2, 1, 9, 8\]"),
        (dict(mask=torch.ones(2, 1, 8, 8), x0=torch.ones(1, *SHAPE)), r"x0 has shape \[1, 4, 8, 8\]"),
        (dict(x_T=torch.ones(1, *SHAPE)), r"x_T has shape \[1, 4, 8, 8\], the samples have \[2, 4, 8, 8\]"),
        (dict(generator=[torch.Generator()]), "1 generators for a batch of 2"),
        (dict(noise_dropout=0.5, generator=torch.Generator()), "noise_dropout"),
        (
            dict(conditioning=CONTEXT, unconditional_conditioning=CONTEXT[:1], unconditional_guidance_scale=2.0),
            "encode as many empty prompts",
        ),
        (
            dict(
                conditioning=[CONTEXT],
                unconditional_conditioning={"c_crossattn": CONTEXT},
                unconditional_guidance_scale=2.0,
            ),
            "a dict with .'c_crossattn'., the conditioning is a list of 1",
        ),
    ],
)
def test_refused_arguments(model, kind, arguments, message):
    with pytest.raises(InputError, match=message) as error:
        SAMPLERS[kind](model).sample(**{"S": 5, "batch_size": 2, "shape": SHAPE, "verbose": False, **arguments})
    assert "\n" not in str(error.value)
    assert model.steps == [], "refused before the model runs"


@pytest.mark.parametrize("kind", ["plms", "dpm"])
def test_deterministic_samplers_refuse_eta(model, kind):
    with pytest.raises(ValueError, match="deterministic"):
        SAMPLERS[kind](model).sample(5, 1, SHAPE, eta=0.5, verbose=False)


def test_refused_image_to_image(model):
    sampler = DDIMSampler(model)
    sampler.make_schedule(20, verbose=False)
    for t in (21, -1):
        with pytest.raises(InputError, match="expected 0 to 20"):
            sampler.stochastic_encode(torch.zeros(1, *SHAPE), torch.tensor([t]))
    for t in (0, 21):
        with pytest.raises(InputError, match="expected 1 to 20"):
            sampler.decode(torch.zeros(1, *SHAPE), None, t, verbose=False)
    with pytest.raises(InputError, match="unknown ddim_discretize"):
        sampler.make_schedule(20, ddim_discretize="cubic")


def test_a_model_without_text_refuses_prompts():
    from ldm.generate import Settings, generate

    with pytest.raises(InputError, match="this model has no text encoder, so it cannot draw prompts"):
        generate(SimpleNamespace(cond_stage_model=None), ["a cat"], [0], Settings())
