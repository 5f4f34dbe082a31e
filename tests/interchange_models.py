"""A Stable Diffusion v1 of small width, for the tests of file formats: the real block structure, random weights."""

import importlib
import json

import torch
from omegaconf import OmegaConf

from ldm.checkpoints import save_safetensors
from ldm.config import instantiate_from_config, load_config
from ldm.models.building import reinit_zero_layers
from tests.conftest import ROOT

PROMPT = "a photo of a cat in the jungle"


def small_config(folder):
    """SD v1's config with narrow layers; the text encoder's configuration and tokenizer lie in `folder`."""
    text = json.loads((ROOT / "models/sd-mini/clip/config.json").read_text())["text_config"]
    narrow = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**text, **narrow, "projection_dim": 24}))
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        (folder / name).write_text((ROOT / "models/sd-mini/clip" / name).read_text())
    small = {
        "image_size": 8,
        "unet_config": {"params": {"model_channels": 32, "context_dim": 24, "num_heads": 4, "use_checkpoint": False}},
        "first_stage_config": {"params": {"ddconfig": {"ch": 32, "resolution": 64, "ch_mult": [1, 1, 2, 2]}}},
        "cond_stage_config": {"params": {"version": str(folder), "max_length": 32}},
    }
    base = load_config(ROOT / "configs/stable-diffusion/v1-model.yaml")
    return OmegaConf.merge(base, {"model": {"params": {**small, "timesteps": 1000}}})


def small_model(config, seed=0):
    """The model of a config with random weights, none of them zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = instantiate_from_config(config.model).eval().requires_grad_(False)
        reinit_zero_layers(model)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("bias"):
                parameter.data = 0.1 * torch.randn_like(parameter)
    return model


def save(model, path):
    """Write a model's whole state as a checkpoint."""
    save_safetensors(path, model.state_dict())
    return path


@torch.no_grad()
def unet_output(model, seed=1):
    """The UNet's answer to fixed random latents under an encoded prompt."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    return model.model.diffusion_model(x, torch.tensor([321]), model.get_learned_conditioning([PROMPT]))


def run(name, *args):
    """A command of `scripts/` through its `main`."""
    importlib.import_module(f"scripts.{name}").main([str(arg) for arg in args])
