"""Folders of diffusers in shards and variants, written by diffusers."""

import json

import pytest
import torch

from ldm.errors import InputError
from ldm.interchange import diffusers_model
from tests import interchange_models

torch.set_num_threads(1)
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    config = interchange_models.small_config(tmp_path_factory.mktemp("clip"))
    folder = tmp_path_factory.mktemp("diffusers") / "small"
    diffusers_model.write_folder(folder, interchange_models.small_model(config).state_dict(), config.model.params)
    return diffusers.StableDiffusionPipeline.from_pretrained(folder), diffusers_model.read_folder(folder)


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
@pytest.mark.parametrize(("safe", "size"), [(True, "2MB"), (False, "2MB"), (True, "1GB")])
def test_what_diffusers_saves_is_read(pipeline, tmp_path, variant, safe, size):
    theirs, expected = pipeline
    theirs.save_pretrained(tmp_path / "x", variant=variant, safe_serialization=safe)
    for file in (tmp_path / "x/unet").glob("diffusion_pytorch_model*"):
        file.unlink()
    theirs.unet.save_pretrained(tmp_path / "x/unet", variant=variant, safe_serialization=safe, max_shard_size=size)
    assert bool(list((tmp_path / "x/unet").glob("*.index*.json"))) == (size == "2MB")
    found = diffusers_model.read_folder(tmp_path / "x")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_damaged_shards(pipeline, tmp_path):
    theirs, _ = pipeline
    theirs.save_pretrained(tmp_path / "x")
    (unet := tmp_path / "x/unet").joinpath("diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="unet holds none of .* nor an index of shards"):
        diffusers_model.read_folder(tmp_path / "x")
    theirs.unet.save_pretrained(unet, max_shard_size="2MB")
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="unet lacks 1 weights that .* names, e.g. 'more'"):
        diffusers_model.read_folder(tmp_path / "x")
    content["weight_map"]["more"] = "../model_index.json"
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="expected names of files beside it"):
        diffusers_model.read_folder(tmp_path / "x")
    next(unet.glob("*-00001-of-*")).unlink()
    with pytest.raises(InputError, match="unet lacks diffusion_pytorch_model-00001-of"):
        diffusers_model.read_folder(tmp_path / "x")
