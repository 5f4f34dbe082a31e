"""On a GPU: what a CPU computes, half precision, CUDA graphs, checkpointing, whole runs. Skipped without one.

`python -m pytest -m gpu` runs these and the others that need a GPU, and so does `make gpu`.
"""

import copy

import pytest
import torch

from ldm import generate
from ldm.config import instantiate_from_config
from ldm.devices import cast_frozen
from ldm.interchange.compose import compose
from ldm.interchange.custom_diffusion import COMPRESSED, Delta
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.train.compiled import compile_module, own_gradients
from tests import runs, tuned_models
from tests.helpers import assert_close_to

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GPU = torch.device("cuda")
POSITION = tuned_models.family("position.PositionAdapters", adapter_config=tuned_models.ROUTE)
FAMILIES = {
    "position": POSITION,
    "lora": {"family": "lora"},
    "words": tuned_models.family("textual_inversion.TextualInversion", words="<sks>", init_word="dog"),
    "custom diffusion": {"family": "cross-attention"},
    "norms": {"family": "norms"},
}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions in fp32 keep all bits, as on a CPU; no graph is left over from another test."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()


def batch_on(device, number=0):
    batch = tuned_models.batch(number)
    return {**batch, "image": batch["image"].to(device)}


def tuned_on(device, family=POSITION, **unet):
    torch.manual_seed(0)
    model = tuned_models.shake(tuned_models.model([family], unet=unet)).to(device).train()
    model.learning_rate = 1e-2
    return model


def fixed(model):
    """The model with draws from the CPU, which are the same on every device."""
    draw = model.draw

    def on_cpu(batch):
        x_start, cond, *_ = draw(batch)
        generator = torch.Generator().manual_seed(7)
        noise = torch.randn(x_start.shape, generator=generator).to(x_start.device)
        t = torch.tensor([3, 80], device=x_start.device)
        return x_start, cond, t, noise, model.q_sample(x_start, t, noise)

    model.draw = on_cpu
    return model


def gradients(device, family=POSITION, half=False, **unet):
    model = fixed(tuned_on(device, family, **unet))
    if half:
        cast_frozen(model.model.diffusion_model, torch.bfloat16)
    ((loss, _),) = model.losses([batch_on(device)])
    loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_is_that_of_a_cpu(name):
    (expected_loss, expected), (loss, found) = (gradients(device, FAMILIES[name]) for device in ("cpu", GPU))
    assert loss == pytest.approx(expected_loss, rel=1e-4) and found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close_to(found[key], value, 1e-2)  # where sums cancel, their order is left over


@pytest.mark.parametrize("kind", [True, "selective"])
def test_checkpointing_changes_no_gradient(kind):
    (_, expected), (_, found) = gradients(GPU), gradients(GPU, use_checkpoint=kind)
    for key, value in expected.items():
        assert_close_to(found[key], value, 1e-3)


def test_a_base_in_bf16():
    (expected, _), (loss, found) = gradients(GPU), gradients(GPU, half=True)
    assert loss == pytest.approx(expected, rel=0.02)
    assert found and all(value.dtype == torch.float32 and value.isfinite().all() for value in found.values())


def trained(mode=None, accumulated=1, steps=4):
    """Losses of a training, and what it learnt."""
    torch._dynamo.reset()
    model = tuned_on(GPU)
    if mode:
        compile_module(model.model.diffusion_model, mode)
        own_gradients(model.model.diffusion_model)
    optimizer, losses = model.configure_optimizers(), []
    for step in range(steps):
        for part in range(accumulated):
            torch.manual_seed(10 * step + part)
            ((loss, _),) = model.losses([batch_on(GPU, 10 * step + part)])
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(losses), {name: p.detach().cpu() for name, p in model.trainable_parameters().items()}


@pytest.mark.parametrize(("mode", "accumulated"), [("default", 1), ("reduce-overhead", 1), ("reduce-overhead", 2)])
def test_a_compiled_training_learns_the_same(mode, accumulated):
    (expected, weights), (losses, found) = trained(None, accumulated), trained(mode, accumulated)
    assert_close_to(losses, expected, 1e-2)
    for name, value in weights.items():
        assert_close_to(found[name], value, 0.05)


def pictures(model, sampler="ddim", steps=4):
    return generate.generate(model.eval(), ["a cat", "a dog"], [1, 2], generate.Settings(sampler, steps=steps, scale=3))


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_sampling_is_that_of_a_cpu(sampler):
    expected, found = (pictures(tuned_on(device), sampler) for device in ("cpu", GPU))
    assert found.device.type == "cpu"
    assert_close_to(found, expected, 1e-2)


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_sampling_by_cuda_graphs(sampler):
    model = tuned_on(GPU)
    expected = pictures(model, sampler)
    compile_module(model.model.diffusion_model, "reduce-overhead")
    for _ in range(2):
        assert_close_to(pictures(model, sampler), expected, 1e-2)


def test_sampling_in_fp16():
    model = tuned_on(GPU)
    settings = generate.Settings("ddim", steps=4, scale=3, half=True)
    found = generate.generate(model.eval(), ["a cat", "a dog"], [1, 2], settings)
    assert_close_to(found, pictures(model), 0.1)


def run_on_gpu(work, name, *more):
    runs.main_dream_booth(*runs.arguments(work, "-n", name, "--accelerator", "gpu", "--devices", "1", *more))
    return runs.find_run(work, name)


@pytest.mark.parametrize(
    "how",
    [
        ["--precision", "16-mixed"],
        ["--precision", "bf16-mixed", "--base_precision", "bf16"],
        ["--strategy", "ddp", "--accumulate_grad_batches", "2"],
    ],
    ids=["fp16", "bf16", "DDP of one"],
)
def test_a_run(tmp_path, how):
    """From caches to checkpoints; with fp16 under a scaler of gradients."""
    run = run_on_gpu(tmp_path, "run", "--max_steps", "4", *how)
    learnt = runs.last(run)["state_dict"]
    assert learnt and all(value.isfinite().all() and value.dtype == torch.float32 for value in learnt.values())
    losses = [scalar.value for scalar in runs.events(run).Scalars("train/loss")]
    assert len(losses) == 4 and all(loss == loss for loss in losses)


def test_class_pictures_and_a_resume(tmp_path):
    reg = runs.pictures(tmp_path / "class", 3, seed=1)
    run = run_on_gpu(tmp_path, "run", "--max_steps", "2", "--num_class_images", "5",
                     "--reg_data_root", str(tmp_path / "new"))  # fmt: skip
    assert len(list((tmp_path / "new").glob("*.png"))) == 5 and len(list(reg.iterdir())) == 3
    runs.resume(run, "--max_steps", "4")
    assert runs.last(run)["global_step"] == 4


def test_composed_concepts():
    base = tuned_models.base_weights()
    names = [name for name in base if COMPRESSED.search(name)]

    def delta(seed):
        generator = torch.Generator().manual_seed(seed)
        weights = {name: base[name] + 0.1 * torch.randn(base[name].shape, generator=generator) for name in names}
        return Delta(weights, {"<new1>": torch.randn(1, 128, generator=generator)})

    captions = ["a photo of a dog on the beach", "two red hats in the snow by night"] * 3

    def joint(device):
        encoder = instantiate_from_config(copy.deepcopy(tuned_models.config())["model"]["params"]["cond_stage_config"])
        text = {n.removeprefix("cond_stage_model."): v for n, v in base.items() if n.startswith("cond_stage_model.")}
        encoder.load_state_dict(text, strict=False)
        return compose(encoder.to(device), base, [delta(1), delta(2)], ["cat", "wooden pot"], captions)

    expected, found = joint("cpu"), joint(GPU)
    assert list(found.tokens) == ["<new1>", "<new2>"]
    for name, value in expected.weights.items():
        assert_close_to(found.weights[name], value, 1e-2)
