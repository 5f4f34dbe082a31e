"""Families of tuning on a tiny Stable Diffusion 2.x and a tiny SDXL: a step of training, and its file."""

import pytest
import torch

from ldm.generate import Settings, generate
from ldm.models.building import build_model
from ldm.modules.cached_encoders import CachedPrompts
from ldm.train.caches import prompts
from ldm.tuning import files
from tests.helpers import assert_close_to
from tests.models.test_sdxl import tiny_config as sdxl
from tests.tuned_models import ROUTE, family

ARCH = {"width": 12, "heads": 2, "layers": 2}
FAMILIES = {
    "position": family("position.PositionAdapters", adapter_config=ROUTE),
    "lora": family("lora.LoRA", rank=2),
    "cross-attention": family("cross_attention.CrossAttention"),
    "norms": family("norms.Norms"),
}


def sd2(**params):
    unet = {
        "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": 1, "channel_mult": [1, 2],
        "attention_resolutions": [1], "num_head_channels": 16, "context_dim": 12, "use_linear_in_transformer": True,
    }  # fmt: skip
    target = "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder"
    params = {
        "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "cond_stage_config": {"target": target, "params": {"arch": ARCH, "layer": "penultimate"}},
        "conditioning_key": "crossattn", "cond_stage_key": "txt", "use_ema": False, "parameterization": "v",
        "first_stage_key": "jpg", "linear_start": 0.00085, "linear_end": 0.012, "image_size": 8, "channels": 4,
    } | params  # fmt: skip
    return {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}


BATCHES = {
    "sd2": (sd2, {"jpg": torch.rand(2, 8, 8, 4), "txt": ["photo of a sks dog", "a cat"]}),
    "sdxl": (sdxl, {"jpg": torch.rand(2, 3, 32, 32), "txt": ["photo of a sks dog", "a cat"]}),
}


def quiet(model):
    model.log = model.log_dict = lambda *_args, **_kwargs: None
    return model


def tuned(base, name):
    torch.manual_seed(0)
    return quiet(build_model(BATCHES[base][0](tuning=[FAMILIES[name]]), None, 0))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("base", BATCHES)
def test_steps_and_a_folder(base, name, tmp_path):
    model = tuned(base, name).train()
    learning = model.trainable_parameters()
    others = {key: value.clone() for key, value in model.state_dict().items() if key not in learning}
    before = {key: value.detach().clone() for key, value in learning.items()}
    optimizer = torch.optim.Adam(learning.values(), lr=1e-2)
    for _ in range(2):  # a new branch begins as the identity, so that its first half moves in the second step
        optimizer.zero_grad()
        model.training_step(BATCHES[base][1], 0).backward()
        optimizer.step()
    assert learning and all(not torch.equal(value, before[key]) for key, value in learning.items())
    assert all(torch.equal(value, others[key]) for key, value in model.state_dict().items() if key in others)
    files.save(model, tmp_path / "tuned")
    again = tuned(base, name)
    files.load(again, tmp_path / "tuned")
    assert all(torch.equal(value, learning[key]) for key, value in again.trainable_parameters().items())
    settings = Settings("dpmpp_2m", steps=2, scale=2.0)
    pictures = [generate(one, ["a sks dog"], [1], settings) for one in (model, again, tuned(base, name))]
    assert torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[0], pictures[2])


@pytest.mark.parametrize("base", BATCHES)
def test_prompts_are_encoded_once(base):
    config, batch = BATCHES[base]
    model = quiet(build_model(config(), None, 0)).eval()
    x, cond = model.clean(batch)
    encoders = model.text_encoders()
    assert len(encoders) == {"sd2": 1, "sdxl": 2}[base]
    for name, encoder in encoders.items():
        assert model.get_submodule(name) is encoder
        model.replace_text_encoder(name, CachedPrompts(encoder, prompts(encoder, batch["txt"][:1], x.device)))
    parts = [value if isinstance(value, dict) else {"c": value} for value in (cond, model.clean(batch)[1])]
    for key in parts[0]:
        assert_close_to(parts[1][key], parts[0][key], 1e-5)  # the second prompt was not known, and is asked for
    assert not any("token_embedding" in name for name in model.state_dict())
    for name, encoder in encoders.items():
        model.replace_text_encoder(name, encoder)
    assert model.text_encoders() == encoders


def test_a_word_of_sd2():
    word = family("textual_inversion.TextualInversion", words="<sks>", init_word="dog")
    torch.manual_seed(0)
    model = quiet(build_model(sd2(tuning=[word]), None, 0)).train()
    [(name, vector)] = model.trainable_parameters().items()
    before = vector.detach().clone()
    model.training_step(BATCHES["sd2"][1] | {"txt": ["photo of a <sks> dog", "a <sks>"]}, 0).backward()
    assert name == "cond_stage_model.new_tokens.vectors.<new0-0>" and vector.grad.any() and before.any()
