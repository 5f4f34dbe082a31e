"""SD-mini's tokenizer: CLIP's format, identifiers as tokens of their own, any text encodes."""

import json

import pytest
from transformers import CLIPConfig, CLIPTokenizer

from scripts.sd_mini import train_tokenizer
from tests.conftest import ROOT

FOLDER = ROOT / "models/sd-mini/clip"


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(FOLDER)


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[1:-1]


@pytest.mark.parametrize("word", ["sks", "zwx", "cat", "noto", "twemoji", "openmoji", "photo", "jungle", "woman"])
def test_words_that_matter_are_one_token(tokenizer, word):
    assert pieces(tokenizer, word) == [word + "</w>"]


@pytest.mark.parametrize("text", ["a <new1> cat", "qwertyzx!? 1984", "a sks dog, in the snow", "ünï 漢字 🙂"])
def test_any_text_encodes_and_decodes(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in ids[1:-1]  # which is also the unknown token
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.replace(" ", "")


def test_configuration_fits_the_vocabulary(tokenizer):
    config = CLIPConfig.from_pretrained(FOLDER)
    text, vision = config.text_config, config.vision_config
    assert text.vocab_size == len(tokenizer) <= 8000
    assert tokenizer.model_max_length == text.max_position_embeddings == 32
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == special
    assert text.eos_token_id == text.vocab_size - 1  # older transformers pool at the highest id
    assert (vision.image_size, vision.patch_size, config.projection_dim) == (64, 8, 128)


def test_the_numbering_is_frozen():
    vocab = json.loads((FOLDER / "vocab.json").read_text(encoding="utf-8"))
    assert (len(vocab), vocab["sks</w>"], vocab["a</w>"], vocab["cat</w>"]) == (5579, 2090, 320, 1115)


def test_training_gives_identifiers_tokens_without_captions_having_them(tmp_path):
    captions = tmp_path / "captions.txt"
    captions.write_text("an emoji of a cat, noto style\nan emoji of ducks\n")
    train_tokenizer.main(["--captions", str(captions), "--out", str(tmp_path / "clip")])
    trained = CLIPTokenizer.from_pretrained(tmp_path / "clip")
    assert pieces(trained, "sks ducks") == ["sks</w>", "ducks</w>"]
    vocab = json.loads((tmp_path / "clip/vocab.json").read_text())
    assert len(vocab) == len(set(vocab.values())) == max(vocab.values()) + 1 == len(trained)


def test_vocabulary_is_bounded():
    words = train_tokenizer.count_words(["many different words in one line"] * 3)
    vocab, merges = train_tokenizer.train_bpe(words, 520)
    assert len(vocab) <= 520 and len(merges) <= 520 - 514
