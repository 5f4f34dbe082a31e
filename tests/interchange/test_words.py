"""Learnt words: what they are called in prompts, in files of LDM, web UIs and diffusers, one text encoder or two."""

import logging

import pytest
import torch

from ldm.checkpoints import save_safetensors
from ldm.commands import Program, sample
from ldm.errors import InputError
from ldm.interchange import embeddings, identify, load_any, words_in
from ldm.modules.encoders.tokens import FileWord, load_words, teach
from tests import interchange_models

torch.set_num_threads(1)


@pytest.fixture
def model(config):
    return interchange_models.small_model(config)


def web_ui(path, name=None, value=1.0):
    """An embedding as web UIs and LDM write it."""
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.full((2, 24), value)}}
    torch.save(content | ({"name": name} if name else {}), path)
    return path


def prompts(*texts):
    return [sample.Text(text) for text in texts]


def ids(model, prompt):
    return model.cond_stage_model.tokenize(prompt)[0].tolist()


def test_a_web_uis_embedding_answers_to_the_name_of_its_file(model, tmp_path, caplog):
    file = web_ui(tmp_path / "foo-toy.pt", name="other")
    with caplog.at_level(logging.INFO):
        load_any(model, file)
    assert "foo-toy.pt is called other inside; its word is the name of the file, <foo-toy>, as" in caplog.text
    tokens = model.cond_stage_model.new_tokens
    assert set(tokens.words) == {"<foo-toy>", "foo-toy"} and len(tokens.vectors) == 2
    assert ids(model, "a foo-toy") == ids(model, "a <foo-toy>") == ids(model, "a FOO-Toy") != ids(model, "a other")


def test_layouts_of_web_uis(tmp_path):
    torch.save({"string_to_param": {"*": torch.ones(1, 24)}}, tmp_path / "<new1>.pt")
    save_safetensors(tmp_path / "bad hands.safetensors", {"emb_params": torch.ones(3, 24)})
    assert list(words_in(tmp_path / "<new1>.pt")) == ["<new1>"]
    assert list(words_in(tmp_path / "bad hands.safetensors")) == ["<bad hands>"]
    torch.save({"string_to_param": {"<cat>": torch.ones(1, 24)}, "name": "x"}, tmp_path / "named.pt")
    assert list(words_in(tmp_path / "named.pt")) == ["<cat>"]  # LDM with a placeholder of one's own


def test_a_files_name_may_be_a_word_of_the_vocabulary_as_in_web_uis(model, tmp_path, caplog):
    load_any(model, web_ui(tmp_path / "cat.pt"))
    assert "cat is a word of the vocabulary; in prompts it means the learnt one now" in caplog.text
    assert ids(model, "a cat") == ids(model, "a <cat>")


def test_a_word_that_names_itself_may_not(model, tmp_path):
    before = ids(model, "a cat")
    embeddings.write_diffusers(tmp_path / "x.safetensors", {"cat": torch.ones(1, 24)})
    for load in (load_any, lambda model, path: load_words(model, path, "--embedding_path")):
        with pytest.raises(InputError, match="the text encoder knows 'cat' already; .* another name, e.g. <cat>"):
            load(model, tmp_path / "x.safetensors")
    assert ids(model, "a cat") == before


def test_case_and_what_follows_a_bracket(model):
    teach({"": model.cond_stage_model}, "<cat-toy>", torch.ones(1, 24))
    teach({"": model.cond_stage_model}, "foo", torch.ones(1, 24))
    new = model.cond_stage_model.new_tokens
    toy, foo = (new.ids_of(word)[0] for word in ("<cat-toy>", "foo"))
    for prompt in ("<cat-toy>", "<Cat-Toy>", "two <cat-toy>s", "(<CAT-TOY>)"):
        assert toy in ids(model, prompt) and new.used_in(prompt) == ["<cat-toy>"]
    assert foo in ids(model, "a Foo!")
    assert not {toy, foo} & set(ids(model, "foos and cat-toys")) and not new.used_in("foos and cat-toys")


def test_words_that_differ_by_case_alone(model):
    new = model.cond_stage_model.new_tokens
    for word in ("<A>", "<a>"):
        teach({"": model.cond_stage_model}, word, torch.ones(1, 24))
    assert new.used_in("<a> and <A>") == ["<a>", "<A>"]


def options(*words):
    return Program("sample").parser().parse_args([str(word) for word in words])


def test_several_files_of_words_and_which_were_loaded(model, tmp_path, capsys, caplog):
    one, two = web_ui(tmp_path / "foo.pt"), web_ui(tmp_path / "qvk.pt", value=2.0)
    sample.add_adapters(model, options("--embedding_path", one, "--embedding_path", two))
    assert capsys.readouterr().out.splitlines() == [f"{one}  words <foo>, foo, *", f"{two}  words <qvk>, qvk"]
    new = model.cond_stage_model.new_tokens
    assert new.words["*"] == new.words["foo"] != new.words["qvk"]
    sample.say_what_words_are_unused(model, prompts("a dog", "a qvk"))
    sample.say_what_words_are_unused(model, [sample.Text("a dog", negative="foo")])
    assert "no prompt uses" not in caplog.text
    sample.say_what_words_are_unused(model, prompts("a dog", "two foos"))
    assert "no prompt uses a learnt word; there are <foo>, foo, *, <qvk>, qvk" in caplog.text


def test_there_and_back(tmp_path):
    words = {"<a>": torch.randn(1, 24), "<b.c>": torch.randn(3, 24)}
    for write, suffix in ((embeddings.write_diffusers, "safetensors"), (embeddings.write_ldm, "pt")):
        files = write(tmp_path / suffix, words)
        assert [file.name for file in files] == [f"a.{suffix}", f"b.c.{suffix}"]
        found = {word: vectors for file in files for word, vectors in embeddings.read(file).items()}
        assert found.keys() == words.keys() and all(torch.equal(found[word], words[word]) for word in words)
    for file in (tmp_path / "pt").iterdir():  # web UIs refuse an embedding file with multiple terms
        assert len(torch.load(file, weights_only=True)["string_to_param"]) == 1


@pytest.mark.parametrize("word", ["<a/b>", "<sks.v2>", "sks.v2", "<..>"])
def test_words_with_dots_and_slashes(tmp_path, word):
    vectors = torch.randn(2, 24)
    torch.save({word: vectors}, tmp_path / "x.bin")
    assert identify(tmp_path / "x.bin") == "words" and list(words_in(tmp_path / "x.bin")) == [word]
    files = embeddings.write_diffusers(tmp_path / "out", {word: vectors, "<other>": vectors})
    assert {file.parent for file in files} == {tmp_path / "out"}
    assert list(embeddings.read(files[0])) == [word]


@pytest.mark.parametrize("names", [["layer.weight"], ["a.b.c"]])
def test_parameters_are_no_words(tmp_path, names):
    torch.save({name: torch.zeros(24, 24) for name in names}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="of no known kind"):
        identify(tmp_path / "x.pt")


def script_of_diffusers(folder, words, end=".safetensors", second=None):
    """The two files of diffusers' script for words of SDXL."""
    for number, part in (("", words), ("_2", second or {word: v + 1 for word, v in words.items()})):
        save_safetensors(folder / f"learned_embeds{number}{end}", part)


@pytest.mark.parametrize("end", [".safetensors", "-steps-500.safetensors"])
def test_two_files_of_one_word(tmp_path, end):
    """Either file, or their folder, which may hold a whole pipeline, too."""
    script_of_diffusers(tmp_path, {"<toy>": torch.randn(2, 16)}, end)
    paths = [tmp_path / f"learned_embeds{number}{end}" for number in ("", "_2")]
    for path in [*paths, *([tmp_path] if end == ".safetensors" else [])]:
        assert identify(path) == "words"
        [(word, (one, two))] = words_in(path).items()
        assert word == "<toy>" and torch.equal(two, one + 1) and one.shape == (2, 16)
    (tmp_path / "model_index.json").write_text("{}")
    assert identify(tmp_path) == "diffusers-model"


def test_two_files_that_do_not_belong_together(tmp_path):
    first = {"<toy>": torch.ones(2, 16)}
    for number, second in enumerate(({"<cat>": torch.ones(2, 16)}, {"<toy>": torch.ones(1, 16)})):
        (folder := tmp_path / str(number)).mkdir()
        script_of_diffusers(folder, first, second=second)
        with pytest.raises(InputError, match="learned_embeds_2.safetensors are not of one training: they hold"):
            words_in(folder)
    (folder / "learned_embeds.safetensors").unlink()
    with pytest.raises(InputError, match="words of SDXL's second text encoder; learned_embeds.safetensors is not"):
        words_in(folder / "learned_embeds_2.safetensors")
    (tmp_path / "learned_embeds.bin").touch()
    save_safetensors(tmp_path / "learned_embeds.safetensors", first)
    assert words_in(tmp_path)["<toy>"].shape == (2, 16)  # of one encoder


@pytest.mark.parametrize("widths", [(768, 1280), (16, 16)])
def test_a_word_of_two_text_encoders_is_one_word(tmp_path, widths):
    vectors = tuple(torch.randn(2, width) for width in widths)
    save_safetensors(tmp_path / "toy.safetensors", dict(zip(("clip_l", "clip_g"), vectors, strict=True)))
    torch.save(dict(zip(("clip_g", "clip_l"), vectors[::-1], strict=True)), tmp_path / "toy.pt")
    for file in (tmp_path / "toy.safetensors", tmp_path / "toy.pt"):
        assert identify(file) == "words"
        [(word, found)] = words_in(file).items()
        assert word == "<toy>" and isinstance(word, FileWord)
        assert all(torch.equal(one, two) for one, two in zip(found, vectors, strict=True))
