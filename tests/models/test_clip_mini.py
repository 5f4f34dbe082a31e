"""CLIP's contrastive training at a tiny width, and the shipped towers."""

import json
import shutil

import pytest
import torch

from ldm.config import find_file
from ldm.data.captioned import compose
from ldm.errors import InputError
from ldm.models.clip import CLIP, contrastive_loss
from tests.helpers import assert_close_to


@pytest.fixture
def tiny(tmp_path):
    """A folder of a CLIP of width 16 with the shipped tokenizer."""
    shipped = find_file("models/sd-mini/clip")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, tmp_path)
    config = json.loads((shipped / "config.json").read_text())
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config["projection_dim"] = 16
    config["text_config"] |= small | {"projection_dim": 16}
    config["vision_config"] |= small | {"image_size": 16, "projection_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    return CLIP(str(tmp_path))


def batch_of_colours(names: list[str]) -> dict:
    from ldm.data.captioned import COLOURS

    nothing = torch.zeros(len(names), 16, 16, 4, dtype=torch.uint8)
    colours = torch.tensor([COLOURS[name] for name in names], dtype=torch.float32)[:, None, None]
    return {"image": compose(nothing, colours), "caption": [f"a {name} square" for name in names]}


def test_steps_of_contrast_lower_the_loss(tiny):
    batch = batch_of_colours(["red", "green", "blue", "yellow", "black", "white"])
    tiny.learning_rate = 3e-3
    optimizer = tiny.configure_optimizers()
    losses = []
    for _ in range(25):
        loss = tiny.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


def test_the_loss_is_cross_entropy_of_the_right_pair_both_ways():
    pictures = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts = torch.nn.functional.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    scale = torch.tensor(5.0)
    logits = scale * pictures @ texts.T
    expected = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    assert_close_to(contrastive_loss(pictures, texts, scale.log(), torch.eye(4, dtype=torch.bool)), expected, 1e-6)


def test_equal_captions_are_not_wrong_for_each_other():
    pictures = torch.eye(3)[[0, 0, 1]]
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    loss = contrastive_loss(pictures, pictures, torch.tensor(100.0).log(), same)
    assert_close_to(loss, torch.tensor(2 / 3).mul(torch.tensor(2.0).log()), 1e-4)


def test_embeddings_for_evaluation_are_those_of_training(tiny):
    batch = batch_of_colours(["red", "blue"])
    pictures = batch["image"].movedim(-1, 1)
    images, texts = tiny.embed(pictures, tiny.tokenize(batch["caption"]))
    assert_close_to(tiny.embed_pictures(pictures), images.detach(), 1e-5)
    assert_close_to(tiny.embed_captions(batch["caption"]), texts.detach(), 1e-5)


def test_a_folder_without_clip_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json"):
        CLIP(str(tmp_path))
