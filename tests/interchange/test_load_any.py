"""Files told apart by looking at them, put into a model, several at once, with strengths; refusals in one line."""

import pickle

import pytest
import torch

from ldm.checkpoints import read_metadata, read_object, save_safetensors
from ldm.commands import Program, sample
from ldm.errors import InputError
from ldm.interchange import assign_tokens, cloneofsimo, custom_diffusion, embeddings, identify, load_any, lora_keys, own
from ldm.interchange.inspection import describe
from ldm.interchange.lora import Lora, delta
from ldm.interchange.names import UNET
from ldm.tuning import choose, files
from tests import interchange_models
from tests.helpers import assert_close_to
from tests.interchange.test_lora_keys import random_lora, same

pytestmark = pytest.mark.slow

torch.set_num_threads(1)


@pytest.fixture
def model(config):
    return interchange_models.small_model(config)


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """One file of each kind."""
    model, folder = interchange_models.small_model(config), tmp_path_factory.mktemp("files")
    lora = random_lora(model, ["attn1", "attn2", "ff.net.0", "self_attn"])
    lora.tokens["<s1>"] = torch.randn(1, 24)
    lora_keys.write_diffusers(folder / "diffusers", lora, model)
    lora_keys.write_kohya(folder / "kohya", lora, model)
    cloneofsimo.write_safetensors(folder / "cloneofsimo", cloneofsimo.from_lora(lora, model))
    cloneofsimo.write_pt(folder / "cloneofsimo-pt", cloneofsimo.from_lora(lora, model))
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: value + 0.2 * torch.randn(value.shape, generator=generator)
        for name, value in model.state_dict().items()
        if custom_diffusion.COMPRESSED.search(name)
    }
    tuned = custom_diffusion.Delta(weights, {"<new1>": torch.randn(1, 24)})
    custom_diffusion.write(folder / "delta", tuned)
    custom_diffusion.write(folder / "delta-diffusers", tuned, "diffusers")
    custom_diffusion.write(folder / "packed", custom_diffusion.compress(tuned, model.state_dict(), 1.0))
    embeddings.write_diffusers(folder / "words", {"<w>": torch.randn(2, 24)})
    interchange_models.save(model, folder / "checkpoint")
    return folder


FILES = ["cloneofsimo", "cloneofsimo-pt", "diffusers", "kohya", "delta", "delta-diffusers", "words", "checkpoint"]


@pytest.mark.parametrize("kind", FILES)
def test_identify(made, kind):
    assert identify(made / kind) == kind


@pytest.mark.parametrize("kind", ["cloneofsimo", "cloneofsimo-pt", "kohya"])
def test_every_lora_format_does_the_same(made, config, model, kind):
    plain, other = interchange_models.unet_output(model), interchange_models.small_model(config)
    load_any(model, made / "diffusers", 0.5)
    load_any(other, made / kind, 0.5)
    expected = interchange_models.unet_output(model)
    assert (expected - plain).norm() > 0.05 * plain.norm()
    assert_close_to(interchange_models.unet_output(other), expected, 1e-4 if kind == "kohya" else 1e-2)
    assert ("<s1>" in other.cond_stage_model.new_tokens.words) == (kind != "kohya")


@pytest.mark.parametrize("kind", ["delta", "delta-diffusers", "packed"])
def test_deltas(made, config, model, kind):
    expected = custom_diffusion.read(made / "delta").weights
    if kind == "packed":
        expected = custom_diffusion.whole(custom_diffusion.read(made / kind), model.state_dict()).weights
    load_any(model, made / kind)
    for name, value in expected.items():
        assert_close_to(model.state_dict()[name], value, 1e-6)
    assert list(model.cond_stage_model.new_tokens.words) == ["<new1>"]


def test_strengths_and_several_at_once(made, model):
    """Each file's change is against the released weights, whatever was loaded before it."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_any(model, made / "diffusers", 0.5)
    load_any(model, made / "delta", 0.25, words=["<cat>"])
    load_any(model, made / "words")
    lora = lora_keys.read(made / "diffusers", model)
    tuned = custom_diffusion.read(made / "delta").weights
    for name in (f"{UNET}middle_block.1.transformer_blocks.0.attn2.to_{x}.weight" for x in "qkv"):
        expected = before[name] + 0.5 * delta(lora.layers[name.removesuffix(".weight")])
        if name in tuned:
            expected = expected + 0.25 * (tuned[name] - before[name])
        assert_close_to(model.state_dict()[name], expected, 1e-5)
    assert list(model.cond_stage_model.new_tokens.words) == ["<cat>", "<w>"]
    assert model.cond_stage_model.tokenize("a <w> b <cat>").max() >= model.cond_stage_model.new_tokens.first_id


def test_folders_of_our_own(config, model, tmp_path):
    """A LoRA with words that was trained here leaves in other formats and does there what it does here."""
    pytest.importorskip("peft", reason="peft, which trains LoRA here, is not installed")
    words = {"words": {"<x>": {"vectors": 2}}}
    chosen = [
        choose({"target": own.LORA, "params": {"rank": 2, "alpha": 3, "targets": [UNET + "*.attn2.to_[kv]"]}}),
        choose({"target": "ldm.tuning.textual_inversion.TextualInversion", "params": words}),
    ]
    for one in chosen:
        one.family.install(model)
    model.tuning.families, model.is_tuned = chosen, True
    generator = torch.Generator().manual_seed(2)
    for parameter in chosen[0].family.trainable(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    files.save(model, tmp_path / "own")
    assert identify(tmp_path / "own") == "adapter"
    lora = own.lora(tmp_path / "own")
    assert {f.scale for f in lora.layers.values()} == {1.5} and lora.tokens["<x>"].shape == (2, 24)
    expected = interchange_models.unet_output(model)
    other = interchange_models.small_model(config)
    assert (interchange_models.unet_output(other) - expected).norm() > 0.01 * expected.norm()
    lora_keys.write_kohya(tmp_path / "lora", Lora(lora.layers), other)
    load_any(other, tmp_path / "lora")
    assert_close_to(interchange_models.unet_output(other), expected, 1e-4)
    third = interchange_models.small_model(config)
    load_any(third, tmp_path / "own")
    assert_close_to(interchange_models.unet_output(third), expected, 1e-4)
    # a file of other programs on a model whose layers peft has wrapped
    same(Lora(lora.layers), lora_keys.read(tmp_path / "lora", third))
    load_any(third, tmp_path / "lora", -1.0)
    plain = interchange_models.unet_output(interchange_models.small_model(config))
    assert_close_to(interchange_models.unet_output(third), plain, 1e-3)


@pytest.mark.parametrize(
    ("given", "named", "taught"),
    [
        (["delta", "delta"], "<a>+<b>", ["<a>", "<b>"]),
        (["delta", "delta-diffusers", "words"], "<a>+<b>", ["<a>", "<b>", "<w>"]),
        (["diffusers", "delta"], "<a>", ["<a>"]),
        (["delta", "cloneofsimo"], "<a>+<b>", ["<a>", "<b>"]),
        (["delta", "cloneofsimo"], None, ["<new1>", "<s1>"]),
    ],
)
def test_names_are_assigned_to_the_words_of_the_files(made, model, given, named, taught):
    given = [word for name in given for word in ("--adapter_path", str(made / name))]
    options = Program("sample").parser().parse_args(given + (["--modifier_token", named] if named else []))
    sample.add_adapters(model, options)
    assert list(model.cond_stage_model.new_tokens.words) == taught


def test_names_must_be_as_many_as_the_words(made):
    with pytest.raises(InputError, match=r"1 words are named \(<a>\), the LoRAs and deltas hold 2: <new1>\+<s1>"):
        assign_tokens(["<a>"], [made / "delta", made / "cloneofsimo"])
    with pytest.raises(InputError, match="the LoRAs and deltas hold 0: none"):
        assign_tokens(["<a>"], [made / "words", made / "kohya"])


def test_a_word_of_several_vectors_stays_one(model, tmp_path):
    word = {"<x>": torch.randn(4, 24)}
    cloneofsimo.write_safetensors(tmp_path / "x.safetensors", cloneofsimo.from_lora(Lora({}, word), model))
    assert identify(tmp_path / "x.safetensors") == "words"
    found = embeddings.read(tmp_path / "x.safetensors")
    assert list(found) == ["<x>"] and torch.equal(found["<x>"], word["<x>"])
    for kind in ("ldm", "diffusers"):
        with pytest.raises(InputError, match="a delta holds one vector for a word; <x> has 4"):
            custom_diffusion.write(tmp_path / "delta", custom_diffusion.Delta({}, word), kind)


@pytest.mark.parametrize("vectors", [1, 3])
def test_diffusers_learns_our_words(config, model, tmp_path, vectors):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    from ldm.interchange import diffusers_model

    diffusers_model.write_folder(tmp_path / "sd", model.state_dict(), config.model.params)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    word = {"<sks>": torch.randn(vectors, 24)}
    [file] = embeddings.write_diffusers(tmp_path / "w.safetensors", word)
    pipeline.load_textual_inversion(str(file.parent), weight_name=file.name)
    load_any(model, file)
    prompt = "a photo of a <sks> cat"
    ids = pipeline.tokenizer(
        pipeline.maybe_convert_prompt(prompt, pipeline.tokenizer),
        padding="max_length",
        max_length=32,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        theirs, ours = pipeline.text_encoder(ids)[0], model.get_learned_conditioning([prompt])
        assert_close_to(theirs, ours, 1e-4)
        assert (ours - model.get_learned_conditioning(["a photo of a cat"])).norm() > 0.01 * ours.norm()


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def spoilt(value, number=float("nan")):
    """The content of a file with one number in its last tensor that is none."""
    if isinstance(value, dict):
        *_, last = value
        return value | {last: spoilt(value[last], number)}
    if isinstance(value, list):
        return [*value[:-1], spoilt(value[-1], number)]
    value = value.clone()
    value.view(-1)[-1] = number
    return value


@pytest.mark.parametrize(
    "kind", ["cloneofsimo", "cloneofsimo-pt", "diffusers", "kohya", "delta", "delta-diffusers", "packed", "words"]
)
def test_what_is_not_finite_is_refused_by_name_in_every_format(made, model, tmp_path, kind):
    content, about = read_object(made / kind), read_metadata(made / kind)
    if (made / kind).read_bytes()[8:9] == b"{":
        save_safetensors(tmp_path / "bad", spoilt(content), about)
    else:
        torch.save(spoilt(content), tmp_path / "bad")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"bad: 1 of \d+ tensors are not finite, e.g. .+; get an undamaged copy"):
        load_any(model, tmp_path / "bad")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_product_that_is_not_finite_is_refused(model, tmp_path):
    """Each number of the file is finite, and the change of the weight is not."""
    layers = random_lora(model, ["attn2"]).layers
    huge = Lora({name: one._replace(down=one.down * 1e30, up=one.up * 1e30) for name, one in layers.items()})
    lora_keys.write_kohya(tmp_path / "huge", huge, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=r"the change of the weights: .* not finite, e.g. .*attn2.* are too large"):
        load_any(model, tmp_path / "huge")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_inspect_tells_of_what_is_not_finite(made, model, tmp_path):
    state = model.state_dict() | {f"{UNET}out.2.bias": torch.tensor([1.0, float("inf"), 0.0, 0.0])}
    save_safetensors(tmp_path / "bad", state)
    assert describe(tmp_path / "bad")["not finite"] == f"1 tensors, e.g. {UNET}out.2.bias: a damaged file"
    assert "not finite" not in describe(made / "checkpoint")


def test_refusals(made, model, tmp_path, capsys):
    with pytest.raises(InputError, match="not something to add"):
        load_any(model, made / "checkpoint")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps([Evil()], protocol=2))
    with pytest.raises(InputError, match="refused: its pickle asks for"):
        load_any(model, tmp_path / "evil.pt")
    torch.save([Evil()], tmp_path / "evil.bin")
    with pytest.raises(InputError, match="refused: its pickle asks for"):
        load_any(model, tmp_path / "evil.bin")
    assert "code ran" not in capsys.readouterr().out
    torch.save({"a.b": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="of no known kind"):
        identify(tmp_path / "x.pt")
    layer = {"linear.0.weight": torch.zeros(8, 4), "linear.0.bias": torch.zeros(8)}  # as the web UI of A1111 has it
    torch.save({768: (layer, layer), 320: (layer, layer), "step": 10, "name": "x"}, tmp_path / "hyper.pt")
    with pytest.raises(InputError, match="hyper.pt is a hypernetwork of web UIs: .* use a LoRA"):
        load_any(model, tmp_path / "hyper.pt")
    with pytest.raises(InputError, match="neither model_index.json"):
        identify(made)
    load_any(model, made / "words")
    with pytest.raises(InputError, match="exists already"):
        load_any(model, made / "words")
    with pytest.raises(InputError, match="2 words are named .* the file holds 1: <w>"):
        load_any(model, made / "words", words=["<c>", "<d>"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrong = Lora(
        {name: f._replace(down=f.down[:, :-1]) for name, f in random_lora(model, ["attn2.to_q"]).layers.items()}
    )
    lora_keys.write_kohya(tmp_path / "wrong", wrong, model)
    with pytest.raises(InputError, match="another base model"):
        load_any(model, tmp_path / "wrong")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
