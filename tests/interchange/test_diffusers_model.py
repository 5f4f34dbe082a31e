"""Whole models to diffusers' folder layout and back, with the installed diffusers as the other side."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from ldm.config import load_config
from ldm.errors import InputError
from ldm.interchange import diffusers_model, names
from tests import interchange_models
from tests.conftest import ROOT
from tests.helpers import assert_close_to

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(config):
    return interchange_models.small_model(config)


@pytest.fixture(scope="module")
def folder(config, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusers") / "small"
    diffusers_model.write_folder(path, model.state_dict(), config.model.params)
    return path


@pytest.fixture(scope="module")
def pipeline(folder):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


def test_there_and_back(model, folder):
    state = {n: v for n, v in model.state_dict().items() if n.startswith((names.UNET, names.VAE, names.TEXT))}
    back = diffusers_model.read_folder(folder)
    assert back.keys() == {name for name in state if not name.endswith("position_ids")}
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_full_size_names(golden):
    """Every key of the released v1 layout has a name in diffusers, and comes back."""
    keys = json.loads((golden / "manifests/sd_v1_manifest.json").read_text())["keys"]
    unet = [key.removeprefix(names.UNET) for key in keys if key.startswith(names.UNET)]
    assert len(unet) == 686 and names.layout_of(unet) == names.UNetLayout()
    table = names.unet_table(names.UNetLayout())
    there = names.translate_all(unet, table, "v1")
    assert len(set(there.values())) == 686
    assert names.layout_of_diffusers(there.values()) == names.UNetLayout()
    assert names.translate_all(there.values(), names.inverse(table), "v1") == {v: k for k, v in there.items()}


@pytest.mark.slow
def test_full_size_names_are_those_of_diffusers(golden):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    keys = json.loads((golden / "manifests/sd_v1_manifest.json").read_text())["keys"]
    configs = diffusers_model.configurations(load_config(ROOT / "configs/stable-diffusion/v1-model.yaml").model.params)
    empty = {name: torch.empty(spec["shape"], device="meta") for name, spec in keys.items()}
    parts = diffusers_model.to_diffusers(empty)
    for part, cls in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        with torch.device("meta"):
            theirs = cls.from_config(configs[part]).state_dict()
        assert {n: v.shape for n, v in parts[part].items()} == {n: v.shape for n, v in theirs.items()}


@torch.no_grad()
def test_the_unet_computes_the_same(model, pipeline):
    x, t, context = torch.randn(2, 4, 16, 16), torch.tensor([3, 900]), torch.randn(2, 7, 24)
    theirs = pipeline.unet(x, t, context).sample
    assert_close_to(theirs, model.model.diffusion_model(x, t, context), 1e-4)


@torch.no_grad()
def test_the_autoencoder_computes_the_same(model, pipeline):
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert_close_to(pipeline.vae.encode(x).latent_dist.mode(), model.first_stage_model.encode(x).mode(), 1e-4)
    z = torch.randn(1, 4, 8, 8)
    assert_close_to(pipeline.vae.decode(z).sample, model.first_stage_model.decode(z), 1e-4)
    assert pipeline.vae.config.scaling_factor == model.scale_factor


@torch.no_grad()
def test_the_text_encoder_computes_the_same(model, pipeline):
    ids = pipeline.tokenizer(
        interchange_models.PROMPT, padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(ids, model.cond_stage_model.tokenize(interchange_models.PROMPT))
    assert_close_to(pipeline.text_encoder(ids)[0], model.get_learned_conditioning([interchange_models.PROMPT]), 1e-4)


def test_the_schedule_is_the_same(model, pipeline):
    assert_close_to(pipeline.scheduler.alphas_cumprod, model.alphas_cumprod, 1e-5)


def test_a_folder_that_diffusers_wrote(model, pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "theirs")
    back, state = diffusers_model.read_folder(tmp_path / "theirs"), model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in back.items())


def test_old_names_of_the_autoencoders_attention(model):
    parts = diffusers_model.to_diffusers(model.state_dict())
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, older in old.items():
        parts["vae"] = {name.replace(f".{new}.", f".{older}."): value for name, value in parts["vae"].items()}
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in diffusers_model.from_diffusers(parts).items())


@pytest.mark.slow
def test_the_config_is_that_of_the_weights(config, model, tmp_path):
    """A folder's JSON is the config's: with another model's it would not load."""
    state, params = model.state_dict(), config.model.params
    first, more = names.UNET + "time_embed.0.weight", names.TEXT + "text_model.encoder.layers.2.mlp.fc1.bias"
    for weights, told in (
        (
            {**state, first: torch.zeros(64, 32)},
            rf"{first} has shape \[64, 32\], the config's model \[128, 32\] \(1 such\)",
        ),
        ({name: value for name, value in state.items() if name != first}, f"{first} has shape none, the config's"),
        ({**state, more: torch.zeros(48)}, rf"{more} has shape \[48\], the config's model none"),
    ):
        with pytest.raises(InputError, match=f"a.ckpt does not fit this config: {told}"):
            diffusers_model.write_folder(tmp_path / "wrong", weights, params, "a.ckpt")
    assert not list(tmp_path.iterdir())
    with_adapters = load_config(ROOT / "configs/sd-inject-dreambooth/attn2o-ffni.yaml").model.params.unet_config.params
    tuned = {"unet_config": {"params": {"adapter_config": with_adapters.adapter_config}}}
    diffusers_model.write_folder(tmp_path / "right", state, OmegaConf.merge(params, tuned))


def test_refusals(model, tmp_path):
    with pytest.raises(InputError, match="model_index.json"):
        diffusers_model.read_folder(tmp_path)
    with pytest.raises(InputError, match="not a whole Stable Diffusion"):
        diffusers_model.to_diffusers({"a": torch.zeros(1)}, "a.ckpt")
    with pytest.raises(InputError, match=r"1 names .*input_blocks.1.7.weight"):
        diffusers_model.to_diffusers({**model.state_dict(), names.UNET + "input_blocks.1.7.weight": torch.zeros(1)})


@pytest.mark.slow
def test_half_weights_make_a_pipeline_of_one_dtype(config, model, tmp_path):
    """The plain `from_pretrained`: diffusers loads float32, and transformers would load what the file holds."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    half = {name: value.half() for name, value in model.state_dict().items()}
    diffusers_model.write_folder(tmp_path / "half", half, config.model.params)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "half")
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(interchange_models.PROMPT, num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)
