"""Feature networks: recognised, read without code, shown what they were trained on."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoints import save_safetensors
from ldm.errors import InputError
from ldm.evaluate import networks
from ldm.evaluate.efficientnet import SamePadding, weights_file
from ldm.evaluate.features import FeatureCache, content_of, vectors_of
from ldm.evaluate.networks import LITE0, Preprocessing, load_network, read_preprocessing
from tests.conftest import ROOT

MINI = "models/sd-mini/clip"
needs_lite0 = pytest.mark.skipif(weights_file() is None, reason="the extra `metrics` is not installed")


def noise(side: int = 40, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def vit_folder(folder, kind: str):
    """A random ViT or DINOv2 as its authors save it, and the network itself."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if kind == "vit":
        module = transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=32), add_pooling_layer=False)
    else:
        module = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    module.eval().save_pretrained(folder)
    how = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(how))
    return module


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_vision_transformer_gives_its_class_token(tmp_path, kind):
    module = vit_folder(tmp_path, kind)
    network = load_network(str(tmp_path))
    picture = noise(32)
    pixels = (torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = module(pixel_values=pixels).last_hidden_state[:, 0]
    assert network.label == "dino" and network.embed_captions is None
    assert torch.allclose(network.vectors([picture]), expected, atol=1e-6)


def test_a_clip_folder_gives_the_projections_of_its_towers():
    network = load_network(MINI)
    picture = noise(64)
    pixels = torch.from_numpy(np.array(picture)).movedim(-1, 0)[None].float() / 127.5 - 1  # -1 .. 1, as it was trained
    clip = network.module.clip
    with torch.no_grad():
        out = clip(pixel_values=pixels, input_ids=network.module.tokenize(["a cat"]))
    assert torch.allclose(network.vectors([picture]), out.image_embeds, atol=1e-5)
    assert torch.allclose(network.embed_captions(["a cat"]), out.text_embeds, atol=1e-5)


def test_a_name_on_the_hub_is_found_in_the_cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--vit"
    snapshot = repository / "snapshots" / ("0" * 40)
    assert networks.folder_of("someone/vit") is None
    vit_folder(snapshot, "vit")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert networks.folder_of("someone/vit") == snapshot and networks.is_there("someone/vit")
    assert load_network("someone/vit").name == "someone/vit"
    (snapshot / "model.safetensors").unlink()
    assert networks.folder_of("someone/vit") is None  # without weights it is not there


def test_networks_are_told_apart_by_their_weights(tmp_path):
    vit_folder(tmp_path / "a", "vit")
    vit_folder(tmp_path / "b", "vit")
    file = tmp_path / "b" / "model.safetensors"
    from safetensors.torch import load_file

    weights = load_file(file)
    weights["layernorm.bias"][7] += 1e-4
    save_safetensors(file, weights, {"format": "pt"})
    digests = [load_network(str(tmp_path / name)).digest for name in "ab"]
    assert digests[0] != digests[1]


def test_what_is_no_network_is_refused_in_a_line(tmp_path):
    with pytest.raises(InputError, match="no network openai/nowhere: .*--download"):
        load_network("openai/nowhere")
    vit_folder(tmp_path, "vit")
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(message, **changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        load_network.cache_clear()
        with pytest.raises(InputError, match=message):
            load_network(str(tmp_path))

    refused("is of no known kind; expected efficientnet-lite0", model_type="resnet")
    refused("auto_map asks for code", auto_map={"AutoModel": "code.Model"})
    refused("num_hidden_layers must be a whole number", num_hidden_layers=10**6)
    refused("qkv_bias must be true or false", qkv_bias="no")
    refused("weights are absent or of another shape", num_hidden_layers=3)
    (tmp_path / "preprocessor_config.json").unlink()
    refused("lacks preprocessor_config.json")


def test_pictures_are_shown_as_the_folder_says(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    how = {"size": {"shortest_edge": 8}, "crop_size": {"height": 4, "width": 4}, "do_center_crop": True,
           "image_mean": [0.0, 0.0, 1.0], "image_std": [1.0, 0.5, 1.0]}  # fmt: skip
    file.write_text(json.dumps(how))
    shown = read_preprocessing(tmp_path)(Image.new("RGB", (32, 16), (255, 255, 0)))
    assert shown.shape == (3, 4, 4)
    assert [channel.unique().tolist() for channel in shown] == [[1.0], [2.0], [-1.0]]
    left_half = Image.new("RGB", (32, 16))
    left_half.paste((255, 0, 0), (0, 0, 16, 16))
    row = read_preprocessing(tmp_path)(left_half)[0, 0]
    assert row[0] == 1 and row[-1] == 0  # the centre, neither squeezed nor shifted
    for changes in ({"image_std": [1, 1]}, {"image_std": [0, 1, 1]}, {"size": {}}, {"crop_size": 9}):
        file.write_text(json.dumps(how | changes))
        with pytest.raises(InputError, match="preprocessor_config.json cannot be used"):
            read_preprocessing(tmp_path)


def test_sd_mini_has_its_own_clip_and_other_bases_the_published_ones(monkeypatch, caplog):
    monkeypatch.setattr(networks, "is_there", lambda name: name == LITE0)
    assert networks.default_networks("sd-mini") == [MINI, LITE0]
    assert networks.default_networks("sd-v1") == ["openai/clip-vit-base-patch32", LITE0]
    assert "facebook/dino-vits16 left out" in caplog.text


@needs_lite0
def test_efficientnet_is_the_published_network():
    network = load_network(LITE0).module
    assert sum(p.numel() for p in network.parameters()) == 4_652_008  # as its authors count
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(network(x), network.features(x) @ network._fc.weight.T + network._fc.bias, atol=1e-4)
        assert network.features(x).shape == (2, 1280) and network.features(x).amin() >= 0


def test_padding_is_that_of_tensorflow():
    layer = SamePadding(1, 1, 3, stride=2, bias=False)
    layer.weight.data.fill_(1)
    ones = torch.ones(1, 1, 4, 4)
    assert layer(ones)[0, 0].tolist() == [[9, 6], [6, 4]]  # nothing is added left of an even picture, one right of it


@needs_lite0
@pytest.mark.slow
def test_efficientnet_knows_what_photographs_show(shared):
    """Classes of ImageNet: dogs are 151 to 268, house cats 281 to 285, a backpack is 414."""
    network = load_network(LITE0)
    kinds = {
        "class_images/dog": (set(range(151, 269)), 0.9), "dreambench/cat": (set(range(281, 286)), 0.6),
        "dreambench/backpack": ({414}, 0.5),
    }  # fmt: skip
    for folder, (classes, least) in kinds.items():
        paths = sorted((shared / "data" / folder).glob("*.jpg"))[:12]
        pictures = [network.preprocess(Image.open(path).convert("RGB")) for path in paths]
        with torch.inference_mode():
            found = network.module(torch.stack(pictures)).argmax(1).tolist()
        assert sum(one in classes for one in found) >= least * len(paths), (folder, found)


def test_a_picture_is_seen_once(tmp_path, monkeypatch):
    network = load_network(MINI)
    seen = []
    vectors = type(network).vectors
    monkeypatch.setattr(type(network), "vectors", lambda self, some: seen.append(len(some)) or vectors(self, some))
    pictures = [noise(16, seed) for seed in (0, 1, 2, 0)]
    first = vectors_of(network, pictures, FeatureCache(tmp_path), batch_size=2)
    assert seen == [2, 1] and torch.equal(first[0], first[3])
    again = vectors_of(network, pictures, FeatureCache(tmp_path))  # another process, as it were
    assert seen == [2, 1] and torch.equal(again, first)
    assert content_of(noise(16, 0)) != content_of(noise(16, 1))
    wide, high = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert content_of(wide) != content_of(high)


def test_a_damaged_cache_is_told(tmp_path):
    (tmp_path / "features.sqlite").write_text("no database, but long enough to be one" * 30)
    with pytest.raises(InputError, match="features.sqlite cannot be used .*remove it"):
        FeatureCache(tmp_path)


def test_the_folder_of_sd_mini_says_what_its_clip_is_shown():
    how = read_preprocessing(ROOT / MINI)
    assert how == Preprocessing(64, 64, [0.5] * 3, [0.5] * 3)


def test_the_network_of_the_docs(monkeypatch):
    (code,) = re.findall(r"```python\n# network\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL)
    monkeypatch.setattr(networks, "NETWORKS", list(networks.NETWORKS))
    exec(compile(code, "docs/evaluation.md", "exec"), {"__name__": "example"})
    network = load_network("colours")
    assert network.vectors([Image.new("RGB", (8, 8), "white")]).tolist() == [[1.0] * 48]
    assert load_network(MINI).label == "clip"
