"""What a diffusers folder says beside its weights: prediction, schedule, heads, scale. It is taken or refused."""

import json

import pytest
import torch
from omegaconf import OmegaConf

from ldm.commands import Program, sample
from ldm.errors import InputError
from ldm.interchange import diffusers_json, diffusers_model
from ldm.interchange.base_files import base_weights
from ldm.interchange.inspection import describe
from ldm.util import load_model_from_config
from tests import interchange_models

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def written(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusers") / "small"
    diffusers_model.write_folder(path, interchange_models.small_model(config).state_dict(), config.model.params)
    return path


@pytest.fixture
def says(written, tmp_path):
    """A copy of the folder whose JSON has other values; the weights are those of the original."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for place in written.iterdir():
        if place.is_file():
            (folder / place.name).write_bytes(place.read_bytes())
            continue
        (folder / place.name).mkdir()
        for file in place.iterdir():
            (folder / place.name / file.name).symlink_to(file)

    def change(part, **values):
        file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        content = json.loads(file.read_text())
        file.unlink()
        file.write_text(json.dumps({key: v for key, v in {**content, **values}.items() if v != "absent"}))
        return folder

    return change


def test_a_folder_agrees_with_its_config(written, config):
    assert diffusers_json.differences(written, config.model.params) == []
    assert base_weights(written, config)


@pytest.mark.parametrize(
    ("part", "key", "value", "setting"),
    [
        ("scheduler", "prediction_type", "v_prediction", "parameterization=v"),
        ("scheduler", "prediction_type", "sample", "parameterization=x0"),
        ("scheduler", "rescale_betas_zero_snr", True, "zero_terminal_snr=True"),
        ("scheduler", "beta_end", 0.02, "linear_end=0.02"),
        ("scheduler", "beta_schedule", "absent", "beta_schedule=sqrt_linear"),
        ("unet", "attention_head_dim", 8, "unet_config.params.num_heads=8"),
        ("unet", "attention_head_dim", [2, 4, 8, 8], "unet_config.params.num_head_channels=16"),
        ("unet", "num_attention_heads", 2, "unet_config.params.num_heads=2"),
        ("unet", "use_linear_projection", True, "unet_config.params.use_linear_in_transformer=True"),
        ("vae", "scaling_factor", 0.5, "scale_factor=0.5"),
    ],
)
def test_what_differs_is_refused_with_the_parameter_to_set(says, config, part, key, value, setting):
    folder = says(part, **{key: value})
    with pytest.raises(InputError, match=rf"folder says .* in {part}, .*: use a config with model.params.{setting}"):
        base_weights(folder, config)
    changes = diffusers_json.adapted(folder, config.model.params, folder)
    other = config.copy()
    for name, new in changes.items():
        OmegaConf.update(other.model.params, name, new)
    assert diffusers_json.differences(folder, other.model.params) == []


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("scheduler", "beta_schedule", "squaredcos_cap_v2"),
        ("scheduler", "trained_betas", [0.1, 0.2]),
        ("unet", "resnet_time_scale_shift", "scale_shift"),
        ("unet", "attention_head_dim", [1, 2, 2, 2]),
        ("text_encoder", "hidden_act", "gelu"),
        ("text_encoder", "num_attention_heads", 4),
        ("vae", "shift_factor", 0.1),
    ],
)
def test_what_no_parameter_describes(says, config, part, key, value):
    folder = says(part, **{key: value})
    for read in (base_weights, lambda path, config: diffusers_json.adapted(path, config.model.params, path)):
        with pytest.raises(InputError, match=rf"folder says {key} .* in {part}.*: this program has no such model"):
            read(folder, config)


def test_another_kind_of_schedule(says, config):
    folder = says("scheduler", _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(InputError, match="FlowMatchEulerDiscreteScheduler is not a schedule of betas"):
        base_weights(folder, config)


def test_sampling_takes_the_folder_as_what_it_is(says, config):
    folder = says("scheduler", prediction_type="v_prediction")
    says("unet", attention_head_dim=8)
    adapted = config.copy()
    sample.adapt(adapted, str(folder))
    model = load_model_from_config(adapted, str(folder))
    assert model.parameterization == "v"
    attention = model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn1
    assert attention.heads == 8
    with pytest.raises(InputError, match="use a config with model.params.parameterization=v"):
        load_model_from_config(config, str(folder))
    assert describe(folder)["prediction type"] == "v_prediction"


def test_a_checkpoint_cannot_say_it_so_its_config_must(says, config, tmp_path):
    folder = says("scheduler", prediction_type="v_prediction")
    OmegaConf.save(config, tmp_path / "eps.yaml")
    OmegaConf.save(OmegaConf.merge(config, {"model": {"params": {"parameterization": "v"}}}), tmp_path / "v.yaml")
    convert = ["convert", str(folder), str(tmp_path / "out.ckpt"), "--to", "checkpoint", "--config"]
    with pytest.raises(InputError, match="folder says prediction_type 'v_prediction'"):
        Program(convert[0])([*convert[1:], str(tmp_path / "eps.yaml")])
    Program(convert[0])([*convert[1:], str(tmp_path / "v.yaml")])
    assert (tmp_path / "out.ckpt").is_file()


@pytest.mark.parametrize(
    ("params", "json"),
    [
        ({"parameterization": "v"}, {"_class_name": "PNDMScheduler", "prediction_type": "v_prediction"}),
        (
            {"parameterization": "v", "zero_terminal_snr": True},
            {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        ({"beta_schedule": "sqrt_linear"}, {"beta_schedule": "linear", "prediction_type": "epsilon"}),
    ],
)
def test_our_folders_say_what_the_model_is(config, params, json):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    merged = OmegaConf.merge(config.model.params, params)
    scheduler = diffusers_model.configurations(merged)["scheduler"]
    assert json.items() <= scheduler.items()
    theirs = getattr(diffusers, scheduler["_class_name"]).from_config(scheduler)
    model = interchange_models.small_model(OmegaConf.merge(config, {"model": {"params": params}}))
    assert torch.allclose(theirs.alphas_cumprod.float(), model.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_schedules_without_a_counterpart(config):
    with pytest.raises(InputError, match="no counterpart of the beta_schedule 'cosine'"):
        diffusers_model.configurations(OmegaConf.merge(config.model.params, {"beta_schedule": "cosine"}))
