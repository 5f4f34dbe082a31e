"""Tiny bases of three kinds as users have them: a file of the UNet alone, a whole diffusers folder, a config."""

import torch

from ldm.checkpoints import save_safetensors
from ldm.interchange import diffusers_model
from ldm.interchange.base_choice import Choice
from ldm.interchange.base_files import base_weights, reader
from ldm.models.bases import UNET, is_ignored
from ldm.models.building import build_model
from tests import interchange_models
from tests.interchange.test_diffusers_bases import config_of

# The prefixes of text encoders.
TEXT = {
    "v1": ["cond_stage_model.transformer."],
    "sd2": ["cond_stage_model.model."],
    "sdxl": ["conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."],
}


class Case:
    """A tiny base with random weights, as a file of its UNet alone and as a whole diffusers folder."""

    def __init__(self, base, folder):
        self.base = base
        self.config = interchange_models.small_config(folder / "clip") if base == "v1" else config_of(base, folder)
        unet = (params := self.config.model.params).get("network_config") or params.unet_config
        unet.params.pop("adapter_config", None)
        state = build_model(self.config, None, random_seed=0).state_dict()
        self.state = {name: value for name, value in state.items() if not is_ignored(name)}
        save_safetensors(folder / "unet.safetensors", {n: v for n, v in self.state.items() if n.startswith(UNET)})
        diffusers_model.write_folder(folder / "whole", state, params)
        self.unet, self.folder, self.whole = folder / "unet.safetensors", folder, folder / "whole"

    def model(self):
        """A model of its own with the weights of the base."""
        return build_model(self.config, self.whole, read=reader(self.config)).eval().requires_grad_(False)

    def below(self, prefix):
        return {name.removeprefix(prefix): v for name, v in self.state.items() if name.startswith(prefix)}

    def file(self, name, weights):
        save_safetensors(self.folder / name, {key: value.clone() for key, value in weights.items()})
        return str(self.folder / name)

    def read(self, path, **choice):
        return base_weights(path, Choice(**choice).into(self.config.copy()))

    def assert_whole(self, weights):
        """All weights are there and equal, but those that Stable Diffusion 2.x does not compute."""
        assert {name for name in weights if not is_ignored(name)} == self.state.keys()
        unused = ("resblocks.2.", "text_projection") if self.base == "sd2" else ("\0",)
        for name, value in self.state.items():
            assert torch.equal(weights[name], value) or any(word in name for word in unused), name
