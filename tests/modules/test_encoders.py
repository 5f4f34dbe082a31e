"""Text encoders: names of released checkpoints, tokenizers that are not there, class labels."""

import pytest
import torch
from torch import nn

from ldm.errors import InputError
from ldm.modules.encoders.modules import BERTEmbedder, ClassEmbedder, FrozenCLIPEmbedder


def test_bert_names_are_those_of_the_released_text_to_image_model():
    names = BERTEmbedder(n_embed=64, n_layer=2, vocab_size=50).state_dict()
    for name in (
        "transformer.token_emb.weight",
        "transformer.pos_emb.emb.weight",
        "transformer.attn_layers.layers.0.0.bias",
        "transformer.attn_layers.layers.0.1.to_q.weight",
        "transformer.attn_layers.layers.2.1.to_out.bias",
        "transformer.attn_layers.layers.3.1.net.0.0.weight",
        "transformer.attn_layers.layers.3.1.net.2.bias",
        "transformer.norm.weight",
        "transformer.to_logits.bias",
    ):
        assert name in names
    assert not any("to_q.bias" in name for name in names)
    assert names["transformer.attn_layers.layers.0.1.to_q.weight"].shape == (512, 64)


def test_bert_attends_to_all_words():
    encoder = BERTEmbedder(n_embed=64, n_layer=1, vocab_size=50, max_seq_len=6, use_tokenizer=False).eval()
    ids = torch.arange(6)[None]
    other = ids.clone()
    other[0, 5] = 9
    first, second = encoder(ids), encoder.encode(other)
    assert first.shape == (1, 6, 64)
    assert not torch.allclose(first[0, 0], second[0, 0])


def test_class_labels_are_one_token():
    encoder = ClassEmbedder(embed_dim=8, n_classes=5, key="class_label")
    assert encoder({"class_label": torch.tensor([1, 4])}).shape == (2, 1, 8)
    assert torch.equal(encoder(torch.tensor([3]))[0, 0], encoder.embedding.weight[3])


def test_a_missing_tokenizer_is_told_with_its_files():
    encoder = FrozenCLIPEmbedder("models/sd-mini/clip")
    encoder.__dict__["version"] = "nobody/no-such-encoder"
    with pytest.raises(InputError, match="vocab.json and merges.txt into models/no-such-encoder"):
        encoder(["a dog"])


def test_an_unknown_encoder_is_refused():
    with pytest.raises(InputError, match="text encoder 'nobody/other'"):
        FrozenCLIPEmbedder("nobody/other")


def test_the_published_encoder_has_its_size():
    with torch.device("meta"):
        encoder = FrozenCLIPEmbedder()
    assert sum(p.numel() for p in encoder.parameters()) == 123_060_480
    assert isinstance(encoder.transformer, nn.Module)
