"""Adapter folders: written whole, read whole or not at all, ours and those of the published code."""

import json
import logging
import platform
import shutil
import subprocess
import sys
import time

import pytest
import torch

from ldm.checkpoints import read_weights, save_safetensors, save_torch
from ldm.errors import InputError
from ldm.modules.adapter_files import adapter_tensors, describe
from ldm.modules.adapters import tapped_blocks
from ldm.modules.folders import read_folder
from ldm.tuning import files
from tests import tuned_models
from tests.conftest import ROOT
from tests.modules.test_adapters import both, conv, mlp, run, unet


@pytest.fixture
def saved(tmp_path):
    model = unet(both(mlp(method="silu"), mlp("attn2c", "attn2c", scale=0.5), res=[conv()]))
    model.save_adapter_to_dir(tmp_path / "adapters", step=7, class_word="dog")
    return model, tmp_path / "adapters"


def test_a_folder_brings_its_adapters_along(saved):
    model, folder = saved
    other = unet()
    other.load_adapter_from_dir(folder)
    assert torch.equal(run(other), run(model)) and describe(other) == describe(model)
    same = unet(both(mlp(method="silu"), mlp("attn2c", "attn2c", scale=3), res=[conv()]))
    same.load_adapter_from_dir(folder)  # the scale is the folder's
    assert torch.equal(run(same), run(model))


def test_the_scale_of_reading(saved):
    model, folder = saved
    off, half = unet(), unet()
    off.load_adapter_from_dir(folder, scale=0)
    half.load_adapter_from_dir(folder, 0.5)
    assert torch.equal(run(off), run(unet()))
    assert {route.scale for _, block in tapped_blocks(half) for route in block.routes} == {0.5, 0.25}


def test_beside_others(saved):
    model, folder = saved
    twice = unet()
    twice.load_adapter_from_dir(folder, scale=0.5)
    twice.load_adapter_from_dir(folder, scale=0.5, add=True)
    torch.testing.assert_close(run(twice), run(model), atol=1e-4, rtol=1e-4)
    assert len(describe(twice)) == 6


def test_a_folder_is_replaced_whole_or_not_at_all(saved, monkeypatch):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as broken:
        broken.setattr("ldm.modules.folders.save_json", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            unet(both(mlp())).save_adapter_to_dir(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapters"]
    unet(both(mlp())).save_adapter_to_dir(folder)
    assert len(json.loads((folder / "adapter_config.json").read_text())["adapters"]) == 1


def test_another_base_is_a_warning(saved, caplog):
    _, folder = saved
    other = unet()
    with caplog.at_level(logging.WARNING):
        other.load_adapter_from_dir(folder)
        assert not caplog.records
    unlike = unet()
    with torch.no_grad():
        unlike.out[2].weight.add_(1)
    with caplog.at_level(logging.WARNING):
        unlike.load_adapter_from_dir(folder)
    assert "was trained on another base model" in caplog.text


def damaged(folder, change):
    file = folder / "adapter_config.json"
    about = json.loads(file.read_text())
    change(about["adapters"])
    file.write_text(json.dumps(about))


MISFITS = {
    "another route": (
        lambda f: unet(both(mlp("ffni", "ffni"))),
        "holds the adapters attn2o-ffni.*this model has ffni-ffni",
    ),
    "another width": (
        lambda f: unet(both(mlp(method="silu", mid_dim=5), mlp("attn2c", "attn2c"), res=[conv()])),
        "mid_dim 4.*mid_dim 5",
    ),
    "a wider model": (
        lambda f: unet(model_channels=64),
        "4 tensors have another shape|tensors have another shape, e.g.",
    ),
    "a smaller model": (lambda f: unet(channel_mult=[1]), "which has no block .* for its adapter"),
    "a bad width": (
        lambda f: damaged(f, lambda a: a[0].update(mid_dim="x")) or unet(),
        "mid_dim must be a whole number",
    ),
    "a bad kind": (lambda f: damaged(f, lambda a: a[0].update(kind="x")) or unet(), "unknown kind 'x'"),
    "a key less": (lambda f: damaged(f, lambda a: a[0].pop("din")) or unet(), "adapter_config.json is damaged"),
    "an adapter less": (lambda f: damaged(f, lambda a: a.pop(0)) or unet(), "16 of its tensors belong to no adapter"),
    "blocks less": (
        lambda f: damaged(f, lambda a: a[0]["blocks"].pop()) or unet(),
        "4 of its tensors belong to no adapter",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(saved, kind):
    prepare, message = MISFITS[kind]
    _, folder = saved
    model = prepare(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    routes = describe(model)
    with pytest.raises(InputError, match=message):
        model.load_adapter_from_dir(folder)
    assert describe(model) == routes
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_folders_of_the_published_code(saved, tmp_path):
    model, folder = unet(both(mlp())), tmp_path / "published"
    for name in {name.split(".adp.")[0] for name in adapter_tensors(model)}:
        save_torch(folder / f"{name}.pt", model.get_submodule(name).state_dict())
    other = unet(both(mlp(mid_dim=4, init="zero")))
    other.load_adapter_from_dir(folder)
    assert torch.equal(run(other), run(model))
    with pytest.raises(InputError, match="does not name its routes: use the config it was trained with"):
        unet().load_adapter_from_dir(folder)
    next(folder.glob("*.pt")).unlink()
    with pytest.raises(InputError, match="4 tensors are missing from it, e.g. "):
        unet(both(mlp())).load_adapter_from_dir(folder)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="adapter folder .* does not exist; expected one that training wrote"):
        other.load_adapter_from_dir(folder)
    folder.mkdir()
    with pytest.raises(InputError, match="holds neither adapters.safetensors nor the .pt files"):
        other.load_adapter_from_dir(folder)


def test_there_must_be_something_to_save(tmp_path):
    with pytest.raises(InputError, match="this model has no adapters to save"):
        unet().save_adapter_to_dir(tmp_path / "adapters")


# --- nothing is loaded in part, damaged or of two writings


def write_json(folder, change):
    file = folder / "adapter_config.json"
    about = json.loads(file.read_text())
    change(about)
    file.write_text(json.dumps(about))


def without_digests(folder, change=lambda about: None):
    """What an older version wrote, with a change."""
    write_json(folder, lambda about: (about.pop("files"), change(about)))


def more_tensors(folder, name, value):
    file = folder / "adapters.safetensors"
    save_safetensors(file, read_weights(file) | {name: value})


UNCLAIMED = {
    "no adapters named": (
        lambda f: without_digests(f, lambda about: about.update(adapters=[])),
        r"adapters.safetensors: \d+ of its tensors belong to no adapter of its adapter_config.json, e.g. \w+",
    ),
    "a tensor more": (
        lambda f: (without_digests(f), more_tensors(f, "out.extra.weight", torch.zeros(1))),
        "adapters.safetensors: 1 of its tensors belong to no adapter .*e.g. out.extra.weight",
    ),
    "a second file": (
        lambda f: (without_digests(f), save_safetensors(f / "tuned.safetensors", {"model.x": torch.zeros(1)})),
        "tuned.safetensors: 1 of its tensors belong to no family of its adapter_config.json, e.g. model.x",
    ),
    "a second file of another writing": (
        lambda f: save_safetensors(f / "tuned.safetensors", {"model.x": torch.zeros(1)}),
        "tuned.safetensors is not among the files that its adapter_config.json lists",
    ),
    "another file": (
        lambda f: more_tensors(f, "out.extra.weight", torch.zeros(1)),
        "adapters.safetensors is not the file that its adapter_config.json was written with",
    ),
    "no file": (lambda f: (f / "adapters.safetensors").unlink(), "adapters.safetensors is not the file that its"),
    "no file, older": (
        lambda f: (without_digests(f), (f / "adapters.safetensors").unlink()),
        "is damaged: it lacks adapters.safetensors",
    ),
    "no JSON beside other families": (
        lambda f: (f / "adapters.safetensors").rename(f / "tuned.safetensors") and (f / "adapter_config.json").unlink(),
        "lacks adapter_config.json, which tells what its tuned.safetensors is",
    ),
    "not finite": (
        lambda f: (
            without_digests(f),
            more_tensors(f, next(iter(read_weights(f / "adapters.safetensors"))), torch.tensor([float("nan")])),
        ),
        r"1 of \d+ tensors are not finite, e.g. \w+",
    ),
    "whole numbers": (
        lambda f: (
            without_digests(f),
            more_tensors(f, next(iter(read_weights(f / "adapters.safetensors"))), torch.tensor([1])),
        ),
        r"is damaged: [\w.]+ is torch.int64, expected floating-point numbers",
    ),
}


@pytest.mark.parametrize("kind", UNCLAIMED)
def test_nothing_is_loaded_in_part(saved, kind):
    change, message = UNCLAIMED[kind]
    _, folder = saved
    change(folder)
    model = unet()
    with pytest.raises(InputError, match=message) as refused:
        model.load_adapter_from_dir(folder)
    assert describe(model) == [] and "\n" not in str(refused.value) and "/proc/" not in str(refused.value)


def test_folders_without_digests_load_as_before(saved):
    model, folder = saved
    without_digests(folder)
    other = unet()
    other.load_adapter_from_dir(folder)
    assert torch.equal(run(other), run(model))


def test_a_unet_alone_does_not_take_a_part_of_a_folder(tmp_path):
    tuned = tuned_models.model([tuned_models.family("biases.Biases"), {"family": "position", "params": {
        "adapter_config": tuned_models.ROUTE}}])  # fmt: skip
    files.save(tuned, tmp_path / "both")
    with pytest.raises(InputError, match=r"holds more than position adapters \(biases\), which a UNet alone"):
        tuned_models.model().model.diffusion_model.load_adapter_from_dir(tmp_path / "both")


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_never_saved(saved, value):
    model, folder = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    name, tensor = list(adapter_tensors(model).items())[3]
    tensor.view(-1)[1] = value
    with pytest.raises(InputError, match=f"is not written: 1 of .* tensors are not finite, e.g. {name}; what is there"):
        model.save_adapter_to_dir(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


WRITER = """
import sys, torch
from ldm.modules.folders import write_folder
entry = {"kind": "transformer_adp_config", "name": "adapter_inout", "din": "attn2o", "dout": "ffni", "scale": 1.0}
for number in range(10**6):
    names = [f"block{i}.adapter_inout.x" for i in range(4 + number % 3)]
    told = {"adapters": [{**entry, "blocks": [name.split(".")[0] for name in names]}], "number": number}
    write_folder(sys.argv[1], told, {name: torch.full((1000,), float(number)) for name in names})
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="elsewhere a folder in the making may be refused")
def test_a_folder_that_is_rewritten_is_read_whole(tmp_path):
    path = tmp_path / "folder"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT)
    try:
        while not path.is_dir():
            assert writer.poll() is None
            time.sleep(0.05)
        seen = set()
        for _ in range(30):
            folder = read_folder(path)
            number = folder.config["number"]
            assert len(folder.adapters) == 4 + number % 3
            assert all((value == number).all() for value in folder.adapters.values())
            seen.add(number)
            time.sleep(0.01)
        assert len(seen) > 3  # else it was not rewritten meanwhile
    finally:
        writer.kill()
        writer.wait()
