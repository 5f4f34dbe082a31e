"""diffusers folders and names on the hub in place of checkpoints: sampling, training, messages."""

import shutil

import pytest
import torch
from huggingface_hub import constants

from ldm.checkpoints import read_weights
from ldm.commands import Program
from ldm.config import load_config
from ldm.errors import InputError
from ldm.interchange import diffusers_model
from ldm.interchange.base_files import base_weights
from ldm.models import bases
from tests import runs
from tests.conftest import ROOT

CKPT, CONFIG = ROOT / "models/sd-mini/model.safetensors", ROOT / "configs/sd-mini/inference.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """SD-mini as a diffusers folder."""
    path = tmp_path_factory.mktemp("base") / "sd-mini"
    diffusers_model.write_folder(path, read_weights(CKPT), load_config(CONFIG).model.params)
    return path


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A cache of the hub that holds `someone/mini`."""
    repository = tmp_path / "hub" / "models--someone--mini"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_name_of_the_hub_is_looked_up_in_its_cache(hub, folder):
    there, here = base_weights("someone/mini"), base_weights(folder)
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in here)
    assert bases.base_of(there).name == "sd-mini"
    with pytest.raises(InputError, match="hf download someone/else"):
        base_weights("someone/else")
    with pytest.raises(InputError, match="checkpoint models/absent.ckpt does not exist"):
        base_weights("models/absent.ckpt")


@pytest.mark.slow
def test_a_folder_draws_what_its_checkpoint_draws(folder, tmp_path):
    drawn = {}
    for name, ckpt in (("folder", folder), ("file", CKPT)):
        Program("sample")([
            "--prompt", "a dog", "--ckpt", str(ckpt), "--ddim_steps", "2", "--n_iter", "1", "--device", "cpu",
            "--outdir", str(tmp_path / name), "--skip_grid",
        ])  # fmt: skip
        (picture,) = (tmp_path / name / "samples").glob("*.png")
        drawn[name] = runs.pixels(picture)
    assert (drawn["folder"] == drawn["file"]).all()


@pytest.mark.slow
def test_training_starts_from_a_folder(folder, tmp_path):
    runs.pictures(tmp_path / "photos", 1)
    runs.main_dream_booth(
        "--base", str(ROOT / "configs/sd-mini/attn2o-ffni.yaml"), "-t", "--actual_resume", str(folder), "--data_root",
        str(tmp_path / "photos"), "--class_word", "dog", "--logdir", str(tmp_path / "logs"), "-n", "mini",
        "--max_steps", "1", "--accelerator", "cpu", "data.params.reg=null", "lightning.callbacks.image_logger=null",
    )  # fmt: skip
    run = runs.find_run(tmp_path, "mini")
    assert load_config(run / "configs" / "project.yaml").dreambooth.base == str(folder)
