"""The CLIP text encoder: released names with any generation of transformers, its tokenizer, words that it learns."""

import shutil

import pytest
import torch

from ldm.checkpoints import save_torch
from ldm.errors import InputError
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.modules.encoders.tokens import read_embeddings
from tests.conftest import ROOT

MINI = ROOT / "models/sd-mini/clip"
OLD = "transformer.text_model."


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """The small encoder's folder without its weights."""
    folder = tmp_path_factory.mktemp("mini") / "clip"
    return str(shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture
def encoder(mini):
    torch.manual_seed(0)
    return FrozenCLIPEmbedder(mini, max_length=16)


def test_released_names(encoder):
    names = set(encoder.state_dict())
    assert all(name.startswith(OLD) for name in names)
    assert f"{OLD}embeddings.position_ids" in names and f"{OLD}final_layer_norm.weight" in names


@pytest.mark.parametrize("spelling", ["released", "present-day"])
def test_both_spellings_are_read(encoder, mini, spelling):
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    if spelling == "present-day":
        state = {
            name.replace(OLD, "transformer."): value for name, value in state.items() if "position_ids" not in name
        }
    torch.manual_seed(1)
    other = FrozenCLIPEmbedder(mini, max_length=16)
    assert not torch.equal(other("a dog"), encoder("a dog"))
    result = other.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other("a dog"), encoder("a dog"))


def test_prompts(encoder, mini):
    hidden = encoder(["photo of a sks dog", ""])
    assert hidden.shape == (2, 16, 128) and not hidden.requires_grad
    assert torch.equal(encoder.encode("photo of a sks dog")[0], hidden[0])
    ids = encoder.tokenize("word " * 100)
    assert FrozenCLIPEmbedder(mini).tokenize("a dog").shape == (1, 32)  # no more than it takes
    assert ids.shape == (1, 16) and ids[0, -1] == encoder.tokenizer.eos_token_id  # cut, but ended
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.transformer.training


def test_a_learnt_word_stands_for_its_vectors(encoder):
    table = encoder.transformer.get_input_embeddings().weight
    word = encoder.tokenize("dog")[0, 1]
    plain = encoder(["photo of a dog", "a house"])
    encoder.add_token("<toy>", table[word][None].clone())
    told = encoder(["photo of a <toy>", "a house"])
    assert torch.equal(told, plain)
    encoder.add_token("*", torch.randn(2, 128))
    assert (encoder.tokenize("a *")[0] != encoder.tokenize("a")[0]).sum() >= 2  # two vectors take two places
    assert not torch.equal(encoder("a *"), encoder("a"))
    assert not any(p.requires_grad for p in encoder.parameters())  # nobody trains it unasked


def test_learnt_words_are_whole_words(encoder):
    tokens = encoder.new_tokens
    for word in ("cat", "cat-toy", "*", "new0"):
        encoder.add_token(word, torch.zeros(1, 128))
    spelt = {word: tokens.words[word] for word in tokens.words}
    assert tokens.spell("a cat-toy, a cat") == f"a {spelt['cat-toy']}, a {spelt['cat']}"
    assert tokens.spell("concatenate a*b") == "concatenate a*b"
    assert tokens.spell("*!") == f"{spelt['*']}!"


def test_words_that_cannot_be_learnt(encoder):
    with pytest.raises(
        InputError, match=r"token 'x': its vectors have shape \[1, 768\], this text encoder takes \[n, 128\]"
    ):
        encoder.add_token("x", torch.zeros(1, 768))
    encoder.add_token("x", torch.zeros(1, 128))
    with pytest.raises(InputError, match="token 'x' exists already"):
        encoder.add_token("x", torch.zeros(1, 128))


def test_files_of_textual_inversion(tmp_path):
    vectors = torch.randn(2, 128)
    parameters = torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors)})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameters}, tmp_path / "ldm.pt")
    save_torch(tmp_path / "plain.bin", {"<toy>": vectors[0]})
    assert torch.equal(read_embeddings(tmp_path / "ldm.pt")["*"], vectors)
    assert torch.equal(read_embeddings(tmp_path / "plain.bin")["<toy>"], vectors[:1])
    save_torch(tmp_path / "other.pt", {"a": torch.zeros(1, 2, 3, 4)})
    with pytest.raises(InputError, match="holds no token embeddings: expected words with vectors"):
        read_embeddings(tmp_path / "other.pt")


def test_no_tokenizer_is_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copy(MINI / "config.json", tmp_path)
    encoder = FrozenCLIPEmbedder(str(tmp_path), max_length=16)  # the model can be built without it
    with pytest.raises(InputError, match="put its vocab.json and merges.txt into models/") as error:
        encoder("a dog")
    assert "\n" not in str(error.value)
    assert FrozenCLIPEmbedder(str(tmp_path), max_length=16, tokenizer=str(MINI))("a dog").shape == (1, 16, 128)


def test_an_unknown_encoder():
    with pytest.raises(InputError, match="text encoder 'no/such': expected a folder with config.json or openai/clip"):
        FrozenCLIPEmbedder("no/such")
