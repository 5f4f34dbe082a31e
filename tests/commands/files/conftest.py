"""A small base and what can be added to it, for the commands on files."""

import pytest
import torch
from omegaconf import OmegaConf

from ldm.interchange import custom_diffusion
from tests import interchange_models
from tests.interchange.test_lora_keys import random_lora


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model as a checkpoint, with its config: both paths and the model."""
    folder = tmp_path_factory.mktemp("base")
    config = interchange_models.small_config(folder / "clip")
    OmegaConf.save(config, folder / "config.yaml")
    model = interchange_models.small_model(config)
    return interchange_models.save(model, folder / "model.safetensors"), folder / "config.yaml", model


@pytest.fixture(scope="module")
def lora(base):
    return random_lora(base[2], ["attn1", "attn2", "ff.net.0", "self_attn"], rank=2)


@pytest.fixture
def tuned(base):
    """A delta of Custom Diffusion with the word `<new1>`."""
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in base[2].state_dict().items()
        if custom_diffusion.COMPRESSED.search(name)
    }
    return custom_diffusion.Delta(weights, {"<new1>": torch.randn(1, 24, generator=generator)})
