"""The UNet against the published one: plain, with each of the 20 routes, adapter folders, names at full size."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ldm.models.building import skip_init
from ldm.modules.adapter_files import adapter_tensors
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from tests.helpers import assert_close_to

ROUTES = [
    f"{reads}-{writes}"
    for reads, outputs in {
        "attn1i": ("attn1i", "attn2i", "ffni", "transo"),
        "attn1o": ("attn2i", "ffni", "transo"),
        "attn2i": ("attn2i", "ffni", "transo"),
        "attn2c": ("attn2c",),
        "attn2o": ("ffni", "transo"),
        "ffni": ("ffni", "transo"),
        "ffno": ("transo",),
        "transo": ("transo",),
        "resi": ("resi", "reso"),
        "reso": ("reso",),
    }.items()
    for writes in outputs
]


@pytest.fixture(scope="module")
def unet(golden):
    return golden / "unet", json.loads((golden / "unet/index.json").read_text())


def build(unet, adapter_config=None):
    folder, index = unet
    model = UNetModel(**index["constructor"], adapter_config=adapter_config).eval()
    lacking = model.load_state_dict(load_file(folder / "base.safetensors"), strict=False).missing_keys
    assert set(lacking) == set(adapter_tensors(model))
    return model


@torch.no_grad()
def run(unet, model):
    data = load_file(unet[0] / "inputs.safetensors")
    return model(data["x"], data["timesteps"], data["context"])


def test_plain(unet):
    assert_close_to(run(unet, build(unet)), load_file(unet[0] / "outputs.safetensors")["plain"])


def test_every_block_of_the_plain_run(unet):
    model, seen = build(unet), {}
    expected = load_file(unet[0] / "plain_intermediates.safetensors")
    for name in expected:
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    run(unet, model)
    for name, value in expected.items():
        assert_close_to(seen[name], value)


def test_the_twenty_routes_are_those_of_the_reference(unet):
    assert sorted(ROUTES) == sorted(unet[1]["configs"])


@pytest.mark.parametrize("route", ROUTES)
def test_route(unet, route):
    folder, index = unet
    config = index["configs"][route]
    model = build(unet, config["adapter_config"])
    adapters = load_file(folder / config["adapters_file"])
    assert set(adapters) == set(adapter_tensors(model))
    model.load_state_dict(adapters, strict=False)
    outputs = load_file(folder / "outputs.safetensors")
    assert_close_to(run(unet, model), outputs[route])
    model.adapters_enable(False)
    assert torch.equal(run(unet, model), run(unet, build(unet)))
    assert sum(t.numel() for t in adapters.values()) == config["n_adapter_params"]


@pytest.mark.parametrize("route", ["attn2o-ffni", "resi-reso"])
def test_published_adapter_folder(unet, route):
    folder, index = unet
    model = build(unet, index["configs"][route]["adapter_config"])
    model.load_adapter_from_dir(folder / f"adapter_dir-{route}")
    assert_close_to(run(unet, model), load_file(folder / "outputs.safetensors")[route])


def test_probes_where_the_norm_epsilons_matter(unet):
    folder, index = unet
    model, probes = build(unet), load_file(folder / "probes.safetensors")
    modules = index["probes"]["modules"]
    checked = 0
    for name, path in modules.items():
        module = model.get_submodule(path) if " " not in path else model.output_blocks[1][-1]
        inputs = [probes[f"{name}.{key}"] for key in ("in", "emb", "context") if f"{name}.{key}" in probes]
        with torch.no_grad():
            assert_close_to(module(*inputs), probes[f"{name}.out"])
        checked += 1
    assert checked == len(modules) == 6


def full_size(golden):
    manifest = json.loads((golden / "manifests/adapters_manifest.json").read_text())
    return manifest["unet_constructor"], manifest["configs"]


@pytest.mark.parametrize("route", ROUTES)
def test_names_and_counts_at_full_size(golden, route):
    constructor, configs = full_size(golden)
    expected = configs[route]
    with skip_init():
        model = UNetModel(**constructor, adapter_config=expected["adapter_config"])
    tensors = adapter_tensors(model)
    assert len(tensors) == expected["n_adapter_tensors"]
    assert sum(t.numel() for t in tensors.values()) == expected["n_adapter_params"]
    for which, name in zip(
        ("first_adapter_key", "last_adapter_key"), (list(tensors)[0], list(tensors)[-1]), strict=True
    ):
        assert expected[which] == [name, list(tensors[name].shape)]
    listed = json.loads((golden / "manifests/adapter_keys_full_size.json").read_text()).get(route)
    if listed:
        assert {name: list(value.shape) for name, value in tensors.items()} == listed
