"""SD-mini as the published commands name their base: a checkpoint, and a name on the hub."""

import functools

import pytest
from huggingface_hub import constants

from ldm.checkpoints import read_weights
from ldm.config import load_config
from ldm.interchange import diffusers_model
from ldm.train.callbacks import ImageLogger
from tests.conftest import ROOT

HUB_NAME = "runwayml/stable-diffusion-v1-5"
CKPT = ROOT / "models/sd-mini/model.safetensors"


@pytest.fixture(scope="package", autouse=True)
def quick_sheets():
    """Sheets of samples take two steps: 50, twice in each run, would be most of what these tests compute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageLogger, "__init__", functools.partialmethod(ImageLogger.__init__, steps=2))
        yield


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory):
    """A hub's cache that holds SD-mini as `HUB_NAME`."""
    cache = tmp_path_factory.mktemp("hub")
    repository = cache / f"models--{HUB_NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    params = load_config(ROOT / "configs/sd-mini/inference.yaml").model.params
    diffusers_model.write_folder(repository / "snapshots" / ("0" * 40), read_weights(CKPT), params)
    return cache


@pytest.fixture
def hub(hub_folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_folder))
    return HUB_NAME
