"""A tiny latent diffusion model with the text encoder of SD-mini, on base weights in a file: what family tests tune."""

import copy
from functools import cache

import torch

from ldm.checkpoints import save_safetensors
from ldm.models.building import build_model
from tests.conftest import ROOT

UNET = {
    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "params": {
        "image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "attention_resolutions": [1],
        "num_res_blocks": 1, "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True,
        "context_dim": 128, "legacy": False,
    },
}  # fmt: skip
ROUTE = {"transformer_adp_config": [{"din": "attn2o", "dout": "ffni", "mid_dim": 4}]}
WORDS = ["photo of a <sks> dog", "a cat"]


def config(tuning=None, unet=None, **params) -> dict:
    unet = copy.deepcopy(UNET) | {"params": UNET["params"] | (unet or {})}
    text = {"version": str(ROOT / "models/sd-mini/clip"), "max_length": 32}
    common = {
        "unet_config": unet,
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": text},
        "conditioning_key": "crossattn", "cond_stage_key": "caption", "use_ema": False, "timesteps": 100,
        "linear_start": 0.00085, "linear_end": 0.012, "image_size": 8, "channels": 4,
    }  # fmt: skip
    target = "ldm.models.diffusion.ddpm.LatentDiffusion"
    return {"model": {"target": target, "params": common | {"tuning": tuning} | params}}


@cache
def base_weights(seed=0):
    """The weights of a base model by name; all bases of one seed are the same."""
    return build_model(config(), None, seed).state_dict()


def model(tuning=None, folder=None, seed=0, **params):
    """A model of the families in `tuning` on the base; loaded from a file, as training and sampling do."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as work:
        path = Path(folder or work) / "base.safetensors"
        save_safetensors(path, base_weights(seed))
        built = build_model(config(tuning, **params), path)
    return built.eval()


def family(name: str, **params) -> dict:
    return {"target": f"ldm.tuning.{name}", "params": params}


@torch.no_grad()
def answer(model, words=WORDS) -> torch.Tensor:
    """The noise that a model predicts for fixed latents under encoded prompts."""
    x = torch.randn(len(words), 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return model.apply_model(x, torch.tensor([7, 80]), model.get_learned_conditioning(words))


def batch(number=0, words=WORDS) -> dict:
    pictures = torch.randn(len(words), 8, 8, 4, generator=torch.Generator().manual_seed(number))
    return {"image": pictures, "caption": words}


def train(model, steps=2, rate=1e-2):
    """Some steps of the model's own optimizer on its own loss."""
    model.learning_rate = rate
    optimizer = model.configure_optimizers()
    for step in range(steps):
        torch.manual_seed(step)
        ((loss, _),) = model.losses([batch(step)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def shake(model, seed=5, size=0.1):
    """Give what learns other values than its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.trainable_parameters().values():
            value.add_(size * torch.randn(value.shape, generator=generator))
    return model
