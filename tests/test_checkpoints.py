"""Files of weights: what people have is read, safely and without copying; what is written is whole."""

import io
import json
import os
import pickle
import platform
import sys
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.checkpoints import (
    atomic_write,
    fingerprint,
    read_metadata,
    read_object,
    read_weights,
    save_safetensors,
    save_torch,
)
from ldm.config import load_config
from ldm.errors import InputError, WriteError
from ldm.interchange import layers
from ldm.models.building import build_model, choose_checkpoint, load_weights, refuse_unknown, skip_init
from ldm.modules.folders import names_adapter
from tests import tuned_models
from tests.conftest import ROOT
from tests.runs import TINY, tiny_model
from tests.tuned_models import ROUTE, answer, family, model, shake


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {"a.weight": torch.randn(3, 4, generator=generator), "a.bias": torch.randn(3, generator=generator)}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- reading


@pytest.mark.parametrize("level", [True, False])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_kind_of_file(tmp_path, kind, level):
    weights, path = tensors(), tmp_path / "weights.any"  # told apart by content, not by name
    content = {"state_dict": weights, "epoch": 3} if level else weights
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    assert same(read_weights(path), weights)


def test_a_file_like_the_released_one(tmp_path):
    """Stable Diffusion v1's holds Lightning's bookkeeping under a class as key, and numpy numbers of numpy 1."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    path = tmp_path / "sd-v1-4.ckpt"
    bookkeeping = {
        ModelCheckpoint: {"best_model_score": np.float64(0.5), "dirpath": "x", "best_k_models": {"y": np.float32(2)}}
    }
    content = {"epoch": 1, "global_step": np.int64(470000), "state_dict": tensors(), "callbacks": bookkeeping}
    torch.save(content, tmp_path / "new.ckpt")
    with zipfile.ZipFile(tmp_path / "new.ckpt") as new, zipfile.ZipFile(path, "w") as old:
        for entry in new.infolist():
            data = new.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(entry.filename, data)
    for file in (path, tmp_path / "new.ckpt"):
        found = read_object(file)
        assert same(read_weights(file), tensors()) and found["global_step"] == 470000
        (cls,) = found["callbacks"]
        assert cls.__name__ == "ModelCheckpoint" and cls is not ModelCheckpoint  # an empty class in its place
        assert found["callbacks"][cls]["best_model_score"] == 0.5


@pytest.mark.parametrize("how", ["reduce", "import"])
def test_code_is_not_run(tmp_path, how):
    class Bad:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",)) if how == "reduce" else (__import__, ("antigravity",))

    for path, zipped in ((tmp_path / "zip.ckpt", True), (tmp_path / "legacy.ckpt", False)):
        torch.save({"state_dict": tensors(), "x": Bad()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(
            InputError, match=r"refused: its pickle asks for [\w.]+, which is code, not weights"
        ) as error:
            read_weights(path)
        assert "\n" not in str(error.value)
    plain = tmp_path / "plain.pkl"
    plain.write_bytes(pickle.dumps({"x": Bad()}))
    with pytest.raises(InputError):
        read_weights(plain)
    assert not (tmp_path / "ran").exists() and "antigravity" not in sys.modules


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_files_are_mapped_not_copied(tmp_path, kind):
    path = tmp_path / f"weights.{kind}"
    (save_torch if kind == "ckpt" else save_safetensors)(path, {"a": torch.ones(2**20)})
    weights = read_weights(path)
    with open("/proc/self/maps") as maps:
        mapped = [line for line in maps if str(path) in line]
    assert mapped
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(torch.zeros(2**20))
    model = nn.ModuleDict({"a": layer})
    load_weights(model, {"a.weight": weights["a"]}, "file")
    assert model["a"].weight.data_ptr() == weights["a"].data_ptr()
    with torch.no_grad():
        model["a"].weight.zero_()  # training writes to memory, never to the file
    assert read_weights(path)["a"].sum() == 2**20


# --- building and filling


@contextmanager
def poisoned():
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory,
        True,
    )
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "base.ckpt"
    state = tiny_model().state_dict()
    save_torch(path, {"state_dict": {name: value for name, value in state.items() if not names_adapter(name)}})
    return path


@pytest.mark.parametrize("ema", [False, True])
def test_nothing_stays_uninitialised(base, ema):
    with poisoned():
        assert torch.empty(3).isnan().all()  # else this test would prove nothing
        with skip_init():
            assert nn.Linear(2, 2).weight.isnan().all()
        config = load_config(TINY, [f"model.params.use_ema={ema}", "model.params.train_level=[adapter, unet]"])
        model = build_model(config, base)
    state = model.state_dict()
    assert [name for name, value in state.items() if not value.isfinite().all()] == []
    weights = read_weights(base)
    assert same({name: value for name, value in state.items() if name in weights}, weights)
    assert all(not value.any() for name, value in state.items() if name.endswith("adapter_inout.adp.2.weight"))
    assert ("model_ema.decay" in state) == ema
    if ema:  # averages that the file lacks begin at its weights
        for name, value in model.model.named_parameters():
            assert torch.equal(state["model_ema." + name.replace(".", "")], value), name


def test_averages_of_the_file_are_kept(base, tmp_path):
    weights = read_weights(base)
    averages = {
        "model_ema." + n.removeprefix("model.").replace(".", ""): v + 1
        for n, v in weights.items()
        if n.startswith("model.")
    }
    save_torch(tmp_path / "ema.ckpt", weights | averages | {"model_ema.num_updates": torch.tensor(9, dtype=torch.int)})
    none = "model.params.unet_config.params.adapter_config=null"
    model = build_model(
        load_config(TINY, ["model.params.use_ema=true", "model.params.train_level=[unet]", none]), tmp_path / "ema.ckpt"
    )
    assert model.model_ema.num_updates == 9
    with model.ema_scope():
        inside = model.model.diffusion_model.out[2].bias.clone()
    assert torch.equal(inside, model.model.diffusion_model.out[2].bias + 1)


def test_half_precision_files(base, tmp_path):
    weights = read_weights(base)
    save_torch(tmp_path / "half.ckpt", {name: v.half() if v.is_floating_point() else v for name, v in weights.items()})
    model = build_model(load_config(TINY), tmp_path / "half.ckpt")
    for name, value in model.state_dict().items():
        assert value.dtype == (weights[name].dtype if name in weights else torch.float32)
        if name in weights:
            torch.testing.assert_close(value, weights[name], atol=1e-3, rtol=1e-3)


def test_a_unet_in_half_precision_is_that_of_the_file_without_a_copy(base, tmp_path):
    weights = {name: v.half() if v.is_floating_point() else v for name, v in read_weights(base).items()}
    model = build_model(load_config(TINY), tmp_path / "half.ckpt", read=lambda _: weights, unet_dtype=torch.float16)
    expected = {True: torch.float16, False: torch.float32}
    for name, value in model.named_parameters():
        in_unet = name.startswith("model.diffusion_model.") and not names_adapter(name)
        assert value.dtype == expected[in_unet], name
        assert (name in weights and value.data_ptr() == weights[name].data_ptr()) == in_unet, name


def test_only_a_diffusion_model_has_a_unet(base):
    config = load_config(TINY)
    stage = {"model": config["model"]["params"]["first_stage_config"]}
    with pytest.raises(InputError, match="has no UNet whose precision could be set"):
        build_model(stage, None, unet_dtype=torch.float16)


def test_a_random_base_is_the_same_every_time():
    first, second = (build_model(load_config(TINY), None, random_seed=3) for _ in range(2))
    other = build_model(load_config(TINY), None, random_seed=4)
    assert same(*({n: v for n, v in m.state_dict().items() if not names_adapter(n)} for m in (first, second)))
    assert not torch.equal(first.model.diffusion_model.out[2].weight, other.model.diffusion_model.out[2].weight)
    assert first.model.diffusion_model.out[2].weight.any()  # zero layers would block every gradient


MISFITS = {
    "missing": (
        lambda w: {n: v for n, v in w.items() if "time_embed" not in n},
        r"lacks 4 of \d+ weights \(model.diffusion_model.time_embed",
    ),
    "shape": (
        lambda w: w | {"model.diffusion_model.out.2.bias": torch.zeros(9)},
        r"does not fit this config: model.diffusion_model.out.2.bias has shape \[9\], the model wants \[4\] \(1 such\)",
    ),
    "foreign": (lambda w: {"x": torch.zeros(1)}, r"lacks \d+ of \d+ weights|has no place for \(x\)"),
    "a name more": (
        lambda w: w | {"control_model.x": torch.zeros(1), "y.weight": torch.zeros(1)},
        r"holds 2 tensors that this config has no place for \(control_model.x, y.weight\): use the config",
    ),
    "another adapter": (
        lambda w: w | {"model.diffusion_model.out.adapter_inout.adp.0.weight": torch.zeros(1)},
        r"holds 1 tensors that this config has no place for \(model.*adp.0.weight",
    ),
    "a LoRA": (
        lambda w: w | {"model.diffusion_model.out.2.lora_A.default.weight": torch.zeros(1)},
        r"holds 1 tensors that .*\(model.*lora_A.default.weight\): use the config that",
    ),
    "infinite": (
        lambda w: w | {"model.diffusion_model.out.2.bias": torch.tensor([0, 0, float("inf"), 0])},
        r"1 of \d+ tensors are not finite, e.g. model.diffusion_model.out.2.bias",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit(base, tmp_path, kind):
    change, message = MISFITS[kind]
    save_torch(tmp_path / "bad.ckpt", change(read_weights(base)))
    with pytest.raises(InputError, match=message) as error:
        build_model(load_config(TINY), tmp_path / "bad.ckpt")
    assert "\n" not in str(error.value) and str(tmp_path / "bad.ckpt") in str(error.value)


def test_a_first_stage_that_the_config_replaces_is_left_out_and_said(base, tmp_path, caplog):
    weights = read_weights(base)
    whole = weights | {"first_stage_model.encoder.conv_in.weight": torch.ones(1)}
    save_torch(tmp_path / "whole.ckpt", whole)
    config = load_config(TINY)
    config.model.params.first_stage_config = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    caplog.set_level("INFO")
    build_model(config, tmp_path / "whole.ckpt")
    assert "first_stage_model.* left out, which this config replaces" in caplog.text


def test_bookkeeping_of_released_files_is_left_out(base, tmp_path):
    weights = read_weights(base)
    more = [
        "model_ema.decay", "model_ema.diffusion_modelout2bias", "alphas_cumprod", "posterior_mean_coef2", "logvar",
        "first_stage_model.loss.discriminator.main.0.weight", "cond_stage_model.transformer.text_model.embeddings."
        "position_ids", "first_stage_model.loss.logvar", "scale_factor", "lvlb_weights", "cond_stage_model.logit_scale",
    ]  # fmt: skip
    save_torch(tmp_path / "more.ckpt", {name: torch.zeros(1) for name in more if name not in weights} | weights)
    state = build_model(load_config(TINY), tmp_path / "more.ckpt").state_dict()
    assert same({name: value for name, value in state.items() if name in weights}, weights)


def test_every_name_of_the_released_model_has_a_place(golden):
    names = json.loads((golden / "manifests/sd_v1_manifest.json").read_text())["keys"]
    own = layers.skeleton(load_config(ROOT / "configs/stable-diffusion/v1-inference.yaml")).state_dict()
    refuse_unknown([name for name in names if name not in own], "the release")
    unet = [name.removeprefix("model.") for name in names if name.startswith("model.")]
    averages = ["model_ema." + name.replace(".", "") for name in unet]
    refuse_unknown([*averages, "model_ema.decay", "model_ema.num_updates"], "the release with averages")


@pytest.mark.parametrize("kind", ["lora", "position"])
def test_a_whole_checkpoint_with_what_was_tuned(kind, tmp_path):
    tuning = {
        "lora": [family("lora.LoRA", rank=2)],
        "position": [family("position.PositionAdapters", adapter_config=ROUTE)],
    }[kind]
    tuned = shake(model(tuning))
    save_torch(tmp_path / "whole.ckpt", tuned.state_dict())
    again = build_model(tuned_models.config(tuning), tmp_path / "whole.ckpt").eval()
    words = ["photo of a sks dog", "a cat"]
    assert torch.equal(answer(again, words), answer(tuned, words))
    with pytest.raises(InputError, match="tensors that this config has no place for .*which names its adapters"):
        build_model(tuned_models.config(), tmp_path / "whole.ckpt")


def test_which_checkpoint_is_chosen(tmp_path, caplog):
    file = tmp_path / "own.ckpt"
    file.write_bytes(b"x")
    assert choose_checkpoint({"checkpoint": {"path": str(file), "random_seed": 1}}, None) == (str(file), None)
    assert choose_checkpoint({"checkpoint": {"path": str(file)}}, "given.ckpt") == ("given.ckpt", None)
    assert choose_checkpoint({"checkpoint": {"path": "no.ckpt", "random_seed": 1}}, None) == (None, 1)
    assert "no.ckpt does not exist: starting from random base weights (seed 1)" in caplog.text
    named = {"checkpoint": {"path": "no.ckpt"}}
    for config, message in (({}, "the config names no checkpoint: name a"), (named, "no.ckpt does not exist: name a")):
        with pytest.raises(InputError, match=message):
            choose_checkpoint(config, None)


# --- writing


@pytest.mark.parametrize("write", [save_torch, save_safetensors])
def test_what_is_written_can_be_read_by_the_same_people(tmp_path, write):
    path, plain = tmp_path / "folder" / "file", tmp_path / "plain"
    write(path, tensors())
    plain.touch()
    assert same(read_weights(path), tensors())
    assert path.stat().st_mode == plain.stat().st_mode
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_a_failure_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["folder", "old"])
@pytest.mark.parametrize("can_exchange", [True, False])
def test_folders_are_replaced(tmp_path, monkeypatch, name, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(platform, "system", lambda: "another")
    for content in ("first", "second"):
        with atomic_write(tmp_path / name) as beside:
            beside.mkdir()
            (beside / content).write_text(content)
    assert [p.name for p in (tmp_path / name).iterdir()] == ["second"]
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.skipif(platform.system() != "Linux", reason="only Linux exchanges folders here")
def test_a_folder_is_exchanged_in_one_step(tmp_path, monkeypatch):
    """So that nobody, and no process that is killed, ever sees the place empty."""
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("a second step"))
    with atomic_write(tmp_path / "folder") as beside:
        beside.mkdir()
        (beside / "new").touch()
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "kept").write_text("kept")
    with pytest.raises(InputError, match="results is a folder: expected the name of a file"):
        with atomic_write(tmp_path / "results") as beside:
            beside.write_text("new")
    assert (tmp_path / "results" / "kept").read_text() == "kept"


def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("kept")
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space")
        replace(source, target)

    monkeypatch.setattr(platform, "system", lambda: "another")  # one that takes two steps
    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(WriteError, match="no space; what was"), atomic_write(tmp_path / "folder") as beside:
        beside.mkdir()
    assert (tmp_path / "folder" / "kept").read_text() == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_fingerprint_tells_models_apart():
    weights = tensors()
    assert fingerprint(weights) == fingerprint(dict(reversed(weights.items())))
    assert fingerprint(weights) == fingerprint({name: value.half() for name, value in weights.items()})
    assert fingerprint(weights) != fingerprint(weights | {"a.bias": weights["a.bias"] + 0.1})
    assert fingerprint(weights) != fingerprint({name + "x": value for name, value in weights.items()})


def test_streams_are_not_paths():
    with pytest.raises(TypeError):
        read_weights(io.BytesIO(b"x"))


def test_the_same_content_gives_the_same_file(tmp_path):
    """Also with metadata, which safetensors itself writes in an order of chance."""
    metadata = {f"key {number}": f"é {number}" for number in range(9)}
    tensors = {"b": torch.ones(2), "a": torch.zeros(3)}
    for number in range(5):
        save_safetensors(tmp_path / f"{number}", tensors, metadata)
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(5)}) == 1
    assert read_metadata(tmp_path / "0") == metadata
    assert torch.equal(read_weights(tmp_path / "0")["b"], tensors["b"])
