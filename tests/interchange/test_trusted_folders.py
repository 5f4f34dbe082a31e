"""Folders of text encoders and of diffusers models are data: what they name is refused or not read."""

import json
import shutil

import pytest
import torch

from ldm.checkpoints import save_safetensors
from ldm.errors import InputError
from ldm.interchange import diffusers_model
from ldm.models import bases
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


@pytest.mark.parametrize("place", ["", "text_config"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("build", [lambda f: FrozenCLIPEmbedder(str(f)), lambda f: CLIP(str(f))], ids=["text", "CLIP"])
def test_a_clip_folder_cannot_ask_for_a_kernel_of_a_hub(folder, build, key, place):
    file = folder / "config.json"
    content = json.loads(file.read_text())
    (content[place] if place else content)[key] = "someone/kernel"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"config.json refused: its {key} 'someone/kernel' asks for code"):
        build(folder)


def test_only_known_keys_of_a_clip_folder_are_handed_on(folder):
    from ldm.modules.encoders.claims import read_clip, read_text_tower

    add(folder / "config.json", attn_implementation="eager", quantization_config={"x": 1}, torch_dtype="float16")
    config = read_clip(folder)
    assert set(config) == {"projection_dim", "logit_scale_init_value", "text_config", "vision_config"}
    assert config["text_config"] == read_text_tower(folder) and "model_type" not in config["text_config"]
    built = CLIP(str(folder)).clip.config
    assert built.text_config.hidden_size == 128 and built.vision_config.patch_size == 8
    assert FrozenCLIPEmbedder(str(folder)).transformer.config.hidden_act == "quick_gelu"


WRONG = {
    "a list for the config": ([1], "config.json must be a mapping"),
    "a tower as a word": ({"text_config": "x"}, "expected a mapping in it, got 'x'"),
    "a width as a word": ({"text_config": {"hidden_size": "128"}}, "hidden_size must be a whole number"),
    "no width": ({"text_config": {"hidden_size": None}}, "hidden_size must be a whole number"),
    "an epsilon as a word": ({"layer_norm_eps": "x"}, "layer_norm_eps must be a finite number, got 'x'"),
    "an infinite epsilon": ({"layer_norm_eps": float("inf")}, "layer_norm_eps must be a finite number, got inf"),
    "an id as a list": ({"text_config": {"pad_token_id": [1]}}, "pad_token_id must be a whole number of at least 0"),
    "no such activation": ({"text_config": {"hidden_act": "quick_gleu"}}, "hidden_act .* did you mean quick_gelu"),
    "an activation as a number": ({"text_config": {"hidden_act": 5}}, "hidden_act 5 is unknown; expected a name"),
    "heads that do not divide": ({"text_config": {"num_attention_heads": 7}}, "cannot be used as a text encoder: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_types_in_a_clip_folder_are_one_line(folder, name):
    change, message = WRONG[name]
    file = folder / "config.json"
    content = json.loads(file.read_text())
    for key, value in change.items() if isinstance(change, dict) else ():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(content if isinstance(change, dict) else change))
    with pytest.raises(InputError, match=message) as refused:
        CLIP(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "config.json"])
def test_a_byte_order_mark_is_skipped(folder, name):
    plain = load_tokenizer("CLIPTokenizer", str(folder), ["vocab.json", "merges.txt"])("a cat, a dog")["input_ids"]
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    marked = FrozenCLIPEmbedder(str(folder)).tokenizer("a cat, a dog")["input_ids"]
    assert marked == plain == CLIP(str(folder)).tokenizer("a cat, a dog")["input_ids"]


@pytest.mark.parametrize("name", ["vocab.json", "special_tokens_map.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["5", "[1]", "null", '{"a": [1e400]}', '{"unk_token": {"x": 1}}'])
def test_wrong_types_in_a_tokenizer_are_one_line(folder, name, content):
    """Or are of no importance."""
    (folder / name).write_text(content)
    try:
        load_tokenizer("CLIPTokenizer", str(folder), ["vocab.json", "merges.txt"])
    except InputError as error:
        assert "\n" not in str(error) and "clip" in str(error)
    else:
        assert name != "vocab.json"


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
    """Whatever its JSON names, readable or not: the weights are refused for what they are; nothing was imported."""
    (tmp_path / "model_index.json").write_text('{"unet": ["evil", "Model"], "auto_map": {"a": "evil.b"}')
    for part in bases.DEFAULT.parts.values():
        save_safetensors(tmp_path / part.folder / f"{part.file}.safetensors", {"x": torch.zeros(1)})
        config = '{"_class_name": "evil.Model", "auto_map": {"a": "evil.b"}}'
        (tmp_path / part.folder / "config.json").write_text(config)
    with pytest.raises(InputError, match="unknown|not|lacks"):
        diffusers_model.read_folder(tmp_path)
