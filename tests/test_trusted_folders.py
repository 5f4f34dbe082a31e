"""Folders of text encoders and of diffusers models are data: what they name is refused or not read."""

import json
import shutil

import pytest
import torch

from ldm.checkpoints import save_safetensors
from ldm.errors import InputError
from ldm.interchange import diffusers_model
from ldm.models.clip import CLIP
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokenizers import load_tokenizer
from tests.conftest import ROOT


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A CLIP folder with code of its own."""
    shutil.copytree(ROOT / "models/sd-mini/clip", tmp_path / "clip")
    (tmp_path / "clip/evil.py").write_text("open('ran', 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "clip"


def add(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize("build", [lambda f: FrozenCLIPEmbedder(str(f)), lambda f: CLIP(str(f))], ids=["text", "CLIP"])
def test_a_clip_folder_cannot_ask_for_code(folder, build):
    build(folder)
    add(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModel": "evil.Model"})
    with pytest.raises(InputError, match="config.json refused: its auto_map asks for code"):
        build(folder)
    assert not (folder.parent / "ran").exists()


def test_nor_can_a_tokenizer(folder):
    add(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    with pytest.raises(InputError, match="tokenizer_config.json refused: its auto_map asks for code"):
        load_tokenizer("CLIPTokenizer", str(folder), ["vocab.json", "merges.txt"])
    assert not (folder.parent / "ran").exists()


def test_a_damaged_configuration_is_one_line(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is damaged"):
        FrozenCLIPEmbedder(str(folder))


def test_of_a_diffusers_folder_only_the_weights_are_read(tmp_path):
    """Whatever its JSON names: the weights are refused for what they are, by then nothing was imported."""
    (tmp_path / "model_index.json").write_text('{"unet": ["evil", "Model"], "auto_map": {"a": "evil.b"}')
    for part, stem in diffusers_model.WEIGHTS.items():
        save_safetensors(tmp_path / part / f"{stem}.safetensors", {"x": torch.zeros(1)})
        (tmp_path / part / "config.json").write_text('{"_class_name": "evil.Model", "auto_map": {"a": "evil.b"}}')
    with pytest.raises(InputError, match="unknown|not|lacks"):
        diffusers_model.read_folder(tmp_path)
