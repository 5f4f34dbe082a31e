"""Base models as descriptions: each is recognised as itself, files of others are refused by name, one more is a row."""

import json
import re

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import read_weights, save_safetensors
from ldm.commands import Program
from ldm.commands.sample import config_of
from ldm.config import find_file, load_config, plain
from ldm.errors import InputError
from ldm.interchange import identify, lora_keys
from ldm.interchange.inspection import describe
from ldm.interchange.layers import skeleton
from ldm.models import bases
from ldm.models.bases import BASES, FOREIGN, UNET
from ldm.models.building import build_model, filled_model
from ldm.train.options import dreambooth_parser, parse
from ldm.train.run_config import automatic, opened
from tests import interchange_models
from tests.conftest import ROOT
from tests.interchange.test_lora_keys import random_lora

torch.set_num_threads(1)
PAGE = (ROOT / "docs" / "adding-a-base.md").read_text()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return interchange_models.small_config(tmp_path_factory.mktemp("clip"))


def state_of(path):
    config = plain(load_config(find_file(path)))
    config["model"]["params"]["first_stage_config"]["params"].pop("ckpt_path", None)
    if "VQ" in str(config["model"]):
        pytest.importorskip("taming.modules.vqvae.quantize", reason="vector quantisation needs the extra vq")
    return config, skeleton(config).state_dict()


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_a_base_is_recognised_and_no_other_one(base):
    config, state = state_of(base.config)
    assert [one.name for one in BASES if one.recognises(state)] == [base.name]
    assert not [one.what for one in FOREIGN if one.recognises(state)]
    assert {part for part, place in base.parts.items() if any(n.startswith(place.prefix) for n in state)} == set(
        base.parts
    )
    factor = 2 ** (len(config["model"]["params"]["first_stage_config"]["params"]["ddconfig"]["ch_mult"]) - 1)
    assert config["model"]["params"]["image_size"] * factor == base.size
    assert base.released_name(base.model_name(bases.FIRST_LAYER)) == bases.FIRST_LAYER


@pytest.mark.parametrize("name", ["celebahq-ldm-vq-4", "lsun_bedrooms-ldm-vq-4"])
def test_models_of_one_architecture_share_a_row(name):
    assert bases.base_of(state_of(f"configs/latent-diffusion/{name}.yaml")[1]).name == "ffhq-ldm-vq-4"


def manifest(golden, name):
    keys = json.loads((golden / f"manifests/{name}_manifest.json").read_text())["keys"]
    return {key: torch.empty(spec["shape"], device="meta") for key, spec in keys.items()}


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("sd_v1", "a checkpoint of Stable Diffusion v1: use --config configs/stable-diffusion/v1-inference.yaml"),
        ("sd_v2", "a checkpoint of Stable Diffusion 2.x: use --config configs/stable-diffusion/v2-inference.yaml"),
        ("sd_v2_inpainting", "a checkpoint of Stable Diffusion 2.x inpainting: use --config configs/stable-diff"),
        ("sdxl_base", "a checkpoint of SDXL: use --config configs/sdxl/sd_xl_base.yaml"),
    ],
)  # fmt: skip
def test_released_layouts_are_refused_by_name(golden, config, name, what):
    with pytest.raises(InputError, match=rf"^x.ckpt is {re.escape(what)}.* \(does not fit this config: "):
        filled_model(config, manifest(golden, name), "x.ckpt")


CHOSEN = {"sd_v2": "stable-diffusion/v2-inference", "sdxl_base": "sdxl/sd_xl_base"}


@pytest.mark.parametrize(("name", "config"), CHOSEN.items())
def test_the_config_of_a_checkpoint_is_found(golden, monkeypatch, capsys, name, config):
    monkeypatch.setattr("ldm.interchange.base_files.base_weights", lambda _path: manifest(golden, name))
    assert config_of("x.ckpt") == f"configs/{config}.yaml"
    assert f"x.ckpt is a checkpoint of {bases.base_of(manifest(golden, name)).title}" in capsys.readouterr().out
    assert config_of(None) == bases.DEFAULT.config


TRAINED = {"sd_v1": "sd", "sd_v2": "sd2", "sdxl_base": "sdxl", "sd_v2_inpainting": None}


@pytest.mark.parametrize(("name", "folder"), TRAINED.items())
def test_base_auto_picks_the_config_of_a_training(golden, monkeypatch, name, folder):
    weights = manifest(golden, name)
    monkeypatch.setattr("ldm.interchange.base_files.base_weights", lambda _path: weights)
    if folder is None:
        with pytest.raises(InputError, match="is a checkpoint of Stable Diffusion 2.x inpainting: no config trains it"):
            automatic("x.ckpt")
        return
    chosen = automatic("x.ckpt")
    assert chosen == f"configs/{folder}-inject-dreambooth/attn2o-ffni.yaml"
    assert bases.base_of(state_of(chosen)[1]) is bases.base_of(weights)


def test_base_auto_needs_a_checkpoint():
    options, trainer, overrides = parse(dreambooth_parser(""), ["--base", "auto", "-t"])
    with pytest.raises(InputError, match="--base auto needs --actual_resume"):
        opened(options, overrides, trainer)
    options.actual_resume = str(ROOT / "models/sd-mini/model.safetensors")
    config, _, _ = opened(options, overrides, trainer)
    assert options.base == ["configs/sd-mini/attn2o-ffni.yaml"] and config.model.base_learning_rate


def test_what_is_of_no_base_is_refused_by_the_automatic_choice(monkeypatch):
    for weights, message in (({"a": torch.zeros(1)}, "of no base that is known"), (
        {"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, "a Flux checkpoint"
    )):  # fmt: skip
        monkeypatch.setattr("ldm.interchange.base_files.base_weights", lambda _path, weights=weights: weights)
        with pytest.raises(InputError, match=message):
            config_of("x.ckpt")


def parts_of(state, prefix):
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@pytest.mark.slow
def test_what_is_no_checkpoint_is_refused_by_name(config, tmp_path):
    model = interchange_models.small_model(config)
    state = model.state_dict()
    lora_keys.write_kohya(tmp_path / "kohya", random_lora(model, ["attn2"]), model)
    lora_keys.write_diffusers(tmp_path / "diffusers", random_lora(model, ["attn2"]), model)
    one = torch.zeros(1)
    eight = {**state, bases.FIRST_LAYER: torch.zeros(32, 8, 3, 3)}
    refiner = {**state, bases.LABELS: torch.zeros(1536, 2560)}
    for weights, what in (
        (read_weights(tmp_path / "kohya"), "a LoRA"),
        (read_weights(tmp_path / "diffusers"), "a LoRA"),
        (parts_of(state, bases.FIRST_STAGE), "an autoencoder alone"),
        ({n: v for n, v in state.items() if n.startswith(bases.FIRST_STAGE)}, "an autoencoder alone"),
        (eight, "a Stable Diffusion checkpoint with other input channels"),
        (refiner, "a checkpoint of SDXL's refiner"),
        ({"double_blocks.0.img_attn.qkv.weight": one}, "a Flux checkpoint"),
        ({UNET + "joint_blocks.0.x_block.attn.qkv.weight": one}, "a Stable Diffusion 3 checkpoint"),
        (parts_of(state, bases.TEXT), "the text encoder of a diffusers folder alone"),
    ):
        with pytest.raises(InputError, match=rf"^x is {re.escape(what)}"):
            filled_model(config, weights, "x")
    save_safetensors(tmp_path / "vae", parts_of(state, bases.FIRST_STAGE))
    with pytest.raises(InputError, match="vae is an autoencoder alone: give the checkpoint of a whole model"):
        identify(tmp_path / "vae")


def test_the_same_base_is_not_named(config):
    """Where the base is the right one, the error is about what is wrong with the file."""
    weights = dict(interchange_models.small_model(config).state_dict())
    del weights[bases.CONTEXT]
    with pytest.raises(InputError, match="^x does not fit this config: it lacks 1 of "):
        filled_model(config, weights, "x")
    mini = load_config(find_file("configs/sd-mini/inference.yaml"))
    weights = dict(read_weights(ROOT / "models/sd-mini/model.safetensors"))
    del weights[bases.CONTEXT]
    with pytest.raises(InputError, match="^x does not fit this config: it lacks 1 of "):
        filled_model(mini, weights, "x")


@pytest.fixture
def toy():
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    held = {}
    exec(code, held)
    yield held["TOY"]
    BASES.remove(held["TOY"])


@pytest.mark.slow
def test_one_more_base(toy, config, tmp_path, capsys):
    """The example of docs/adding-a-base.md: loads, is named, becomes a folder and a checkpoint again."""
    model = interchange_models.small_model(config)
    state = model.state_dict()
    inside = tuple(part.prefix for part in toy.parts.values())
    released = {toy.released_name(name): value for name, value in state.items() if name.startswith(inside)}
    assert {name.split(".")[0] for name in released} == {"denoiser", "codec", "prompts"}
    save_safetensors(tmp_path / "toy.safetensors", released)
    assert identify(tmp_path / "toy.safetensors") == "checkpoint"
    assert describe(tmp_path / "toy.safetensors")["base"] == "a checkpoint of the toy model"
    loaded = build_model(config, tmp_path / "toy.safetensors").state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state if name.startswith(inside))
    OmegaConf.save(config, tmp_path / "toy.yaml")
    for source, target, kind in (
        ("toy.safetensors", "folder", "diffusers-model"),
        ("folder", "again.safetensors", "checkpoint"),
    ):
        words = [str(tmp_path / source), str(tmp_path / target), "--to", kind, "--config", str(tmp_path / "toy.yaml")]
        Program("convert")(words)
        assert identify(tmp_path / target) == kind
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    assert index["_class_name"] == "ToyPipeline" and index["denoiser"] == ["diffusers", "UNet2DConditionModel"]
    assert (tmp_path / "folder" / "prompts" / "model.safetensors").is_file()
    again = read_weights(tmp_path / "again.safetensors")
    wanted = {name: value for name, value in released.items() if not name.endswith("position_ids")}
    assert again.keys() == wanted.keys() and all(torch.equal(again[name], wanted[name]) for name in wanted)
    mini = load_config(find_file("configs/sd-mini/inference.yaml"))
    with pytest.raises(InputError, match="toy.safetensors is a checkpoint of the toy model: use --config configs/toy"):
        build_model(mini, tmp_path / "toy.safetensors")
    capsys.readouterr()


def test_a_folder_of_another_pipeline(tmp_path):
    from ldm.interchange import diffusers_model

    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(InputError, match="is a folder of 'FluxPipeline'; expected one of StableDiffusionPipeline"):
        diffusers_model.read_folder(tmp_path)
