"""The names that LoRA files in circulation have for layers, and learnt words among their tensors."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.commands import Program
from ldm.errors import InputError
from ldm.interchange import (
    bundled,
    cloneofsimo,
    diffusers_model,
    identify,
    kinds,
    load_any,
    lora_keys,
    read_lora,
    words_in,
)
from ldm.interchange.formats import Context, by_name
from ldm.interchange.layers import names_in
from ldm.interchange.lora import Lora, delta
from ldm.interchange.names import TEXT, UNET
from ldm.modules.encoders.tokens import FileWord
from tests import interchange_models
from tests.helpers import assert_close_to
from tests.interchange.test_lora_keys import random_lora, same

torch.set_num_threads(1)
OURS = "output_blocks.5.1.transformer_blocks.0.attn2.to_out.0"
THEIRS = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0"
TEXTS = "encoder.layers.1.self_attn.k_proj"
FLAT = {name: name.replace(".", "_") for name in (OURS, THEIRS, TEXTS)}


@pytest.fixture(scope="module")
def model(config):
    return interchange_models.small_model(config)


@pytest.fixture(scope="module")
def lora(model):
    """One layer of the UNet and one of the text encoder."""
    found = random_lora(model, [OURS, TEXTS])
    assert {name.removeprefix(UNET).removeprefix(f"{TEXT}text_model.") for name in found.layers} == {OURS, TEXTS}
    return found


def tensors(lora, unet, text, down="lora_down.weight", up="lora_up.weight", alpha=True):
    """A file's tensors under the stems of the two layers."""
    found = {}
    for name, factors in lora.layers.items():
        stem = unet if name.startswith(UNET) else text
        scale = 1.0 if alpha else factors.scale
        found |= {f"{stem}.{down}": factors.down, f"{stem}.{up}": factors.up * scale}
        if alpha:
            found[f"{stem}.alpha"] = torch.tensor(factors.scale * factors.rank)
    return found


@pytest.mark.parametrize(
    ("unet", "text"),
    [
        (f"lora_unet_{FLAT[THEIRS]}", f"lora_te1_text_model_{FLAT[TEXTS]}"),
        (f"lora_unet_{FLAT[OURS]}", f"lora_te_text_model_{FLAT[TEXTS]}"),
        (f"lycoris_{FLAT[THEIRS]}", f"lycoris_text_model_{FLAT[TEXTS]}"),
        (f"lycoris_unet_{FLAT[OURS]}", f"lycoris_te_text_model_{FLAT[TEXTS]}"),
    ],
)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "state_dict"])
def test_spellings_of_kohya(model, lora, tmp_path, unet, text, nested):
    found = tensors(lora, unet, text)
    torch.save({"state_dict": found} if nested else found, tmp_path / "x.pt")
    assert identify(tmp_path / "x.pt") == "kohya"
    same(lora, read_lora(tmp_path / "x.pt", model))


@pytest.mark.parametrize(
    ("unet", "text"),
    [
        (f"diffusion_model.{OURS}", f"text_encoders.clip_l.transformer.text_model.{TEXTS}"),
        (f"unet.{OURS}", f"text_encoders.clip_l.text_model.{TEXTS}"),
        (f"base_model.model.unet.{THEIRS}", f"base_model.model.text_encoder.text_model.{TEXTS}"),
        (f"base_model.model.{THEIRS}", f"base_model.model.{TEXTS}"),
    ],
)
def test_spellings_with_dots(model, lora, tmp_path, unet, text):
    save_file(tensors(lora, unet, text, "lora_A.weight", "lora_B.weight", alpha=False), tmp_path / "x")
    assert identify(tmp_path / "x") == ("comfyui" if text.startswith("text_encoders.") else "diffusers")
    same(lora, read_lora(tmp_path / "x", model))


def test_processors_of_early_diffusers(model, lora, tmp_path):
    unet, text = THEIRS.replace(".to_out.0", ".processor.to_out"), f"text_encoder.text_model.{TEXTS}"
    text = text.replace("k_proj", "to_k_lora")
    old = tensors(lora, f"unet.{unet}_lora", text, "down.weight", "up.weight", alpha=False)
    torch.save(old, tmp_path / "pytorch_lora_weights.bin")
    same(lora, read_lora(tmp_path / "pytorch_lora_weights.bin", model))


@pytest.mark.parametrize("name", lora_keys.WEIGHTS)
def test_a_folder_that_holds_only_the_weights(model, lora, tmp_path, name):
    found = tensors(lora, f"unet.{THEIRS}", f"text_encoder.text_model.{TEXTS}", "lora_A.weight", "lora_B.weight", False)
    (save_file if name.endswith("safetensors") else torch.save)(found, tmp_path / name)
    assert identify(tmp_path) == "diffusers"
    same(lora, read_lora(tmp_path, model))


def test_bfloat16_and_mixed_ranks(model, tmp_path):
    one, two = random_lora(model, [OURS], rank=2), random_lora(model, [TEXTS], rank=5, scale=0.25)
    mixed = Lora({**one.layers, **two.layers})
    halved = Lora({n: f._replace(down=f.down.bfloat16(), up=f.up.bfloat16()) for n, f in mixed.layers.items()})
    for kind, write in (("kohya", lora_keys.write_kohya), ("diffusers", lora_keys.write_diffusers)):
        write(tmp_path / kind, halved, model)
        found = read_lora(tmp_path / kind, model)
        same(mixed, found, 1e-2)
        assert found.ranks() == [2, 5]
    cloneofsimo.write_safetensors(tmp_path / "x", cloneofsimo.from_lora(halved, model))
    found = read_lora(tmp_path / "x", model)
    same(mixed, Lora({name: found.layers[name] for name in mixed.layers}), 1e-2)


def test_one_layer_under_two_spellings_is_refused(model, lora, tmp_path):
    both = [tensors(lora, f"lora_unet_{FLAT[name]}", f"lora_te_text_model_{FLAT[TEXTS]}") for name in (OURS, THEIRS)]
    torch.save(both[0] | both[1], tmp_path / "x")
    with pytest.raises(InputError, match=f"{OURS} twice, under two spellings"):
        read_lora(tmp_path / "x", model)


@pytest.mark.parametrize("kind", ["kohya", "lycoris"])
def test_words_among_the_tensors(config, lora, tmp_path, capsys, kind):
    """As web UIs and OneTrainer bundle them; a name may have dots."""
    words = {"foo.v2": torch.randn(2, 24), "bar": torch.randn(24)}
    found = tensors(lora, f"lora_unet_{FLAT[THEIRS]}", f"lora_te_text_model_{FLAT[TEXTS]}")
    found |= {f"bundle_emb.{name}.string_to_param.*": vectors for name, vectors in words.items()}
    if kind == "lycoris":
        found[f"lora_unet_{FLAT[THEIRS]}.diff_b"] = torch.zeros(128)
    save_file(found, tmp_path / "x.safetensors")
    assert identify(tmp_path / "x.safetensors") == kind
    assert {word: len(v) for word, v in words_in(tmp_path / "x.safetensors").items()} == {"<foo.v2>": 2, "<bar>": 1}
    other = interchange_models.small_model(config)
    load_any(other, tmp_path / "x.safetensors")
    assert set(other.cond_stage_model.new_tokens.words) == {"<foo.v2>", "foo.v2", "<bar>", "bar"}
    Program("convert")([str(tmp_path / "x.safetensors"), str(tmp_path / "words"), "--to", "words"])
    assert len(list((tmp_path / "words").iterdir())) == 2


def test_words_that_another_format_would_lose_are_told(lora, model, tmp_path, capsys, config):
    found = tensors(lora, f"lora_unet_{FLAT[THEIRS]}", f"lora_te_text_model_{FLAT[TEXTS]}")
    save_file(found | {"bundle_emb.foo.string_to_param.*": torch.ones(1, 24)}, tmp_path / "x.safetensors")
    from tests.interchange.test_formats import write_config

    settings = ["--config", str(write_config(config, tmp_path))]
    Program("convert")([str(tmp_path / "x.safetensors"), str(tmp_path / "y"), "--to", "diffusers", *settings])
    assert "its words <foo> are not in it: --to words" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["kohya", "comfyui", "lycoris"])
@pytest.mark.parametrize("towers", [1, 2])
def test_words_are_written_into_the_file_when_asked(model, lora, tmp_path, kind, towers):
    """By A1111's names: `bundle_emb.<word>.` and the names of an embedding's tensors."""
    vectors = torch.randn(2, 24) if towers == 1 else (torch.randn(2, 24), torch.randn(2, 32))
    words = {"<toy>": vectors, FileWord.of("foo.pt"): vectors}
    value = Lora(lora.layers, words) if kind != "lycoris" else kinds.of_lora(Lora(lora.layers, words))
    by_name(kind).write(tmp_path / "x", value, Context(model, bundles=True))
    names = ("string_to_param.*",) if towers == 1 else ("clip_l", "clip_g")
    held = {key for key in load_file(tmp_path / "x") if key.startswith("bundle_emb")}
    assert held == {f"bundle_emb.{word}.{name}" for word in ("<toy>", "foo") for name in names}
    found = words_in(tmp_path / "x")
    assert found.keys() == {"<toy>", "<foo>"}
    for one, two in zip((found["<toy>"],) if towers == 1 else found["<toy>"], torch.atleast_2d(vectors)[None]
                        if towers == 1 else vectors, strict=True):  # fmt: skip
        assert torch.equal(one, two)
    with pytest.raises(InputError, match="<a.b> has a dot, at which web UIs end the name"):
        bundled.written({"<a.b>": torch.ones(1, 24)})


def test_convert_bundles_words(lora, tmp_path, capsys, config):
    found = tensors(lora, f"lora_unet_{FLAT[THEIRS]}", f"lora_te_text_model_{FLAT[TEXTS]}")
    save_file(found | {"bundle_emb.foo.string_to_param.*": torch.ones(1, 24)}, tmp_path / "x.safetensors")
    from tests.interchange.test_formats import write_config

    settings = ["--config", str(write_config(config, tmp_path))]
    convert = [str(tmp_path / "x.safetensors"), str(tmp_path / "y"), *settings, "--to"]
    Program("convert")([*convert, "kohya", "--bundle_words"])
    assert "layers, ranks [3], words <foo>" in capsys.readouterr().out and list(words_in(tmp_path / "y")) == ["<foo>"]
    Program("convert")([*convert, "kohya", "--force"])
    assert "its words <foo> are not in it: --to words or --bundle_words" in capsys.readouterr().out
    with pytest.raises(InputError, match="--bundle_words: diffusers has no place for words; expected kohya"):
        Program("convert")([*convert, "diffusers", "--force", "--bundle_words"])


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ({"bundle_emb.foo.clip_l": torch.ones(1, 4), "bundle_emb.foo.clip_g": torch.ones(1, 8)}, None),
        ({"bundle_emb.foo.string_to_param.*": torch.ones(1, 1, 4)}, r"must be vectors \[v, d\]"),
        ({"bundle_emb.foo.clip_l": torch.ones(1, 4), "bundle_emb.foo.emb_params": torch.ones(1, 4)}, "expected one of"),
    ],
)
def test_bundled_words_of_two_encoders_and_damaged_ones(lora, tmp_path, key, told):
    save_file(tensors(lora, f"lora_unet_{FLAT[THEIRS]}", f"lora_te_{FLAT[TEXTS]}") | key, tmp_path / "x")
    if told:
        with pytest.raises(InputError, match=told):
            words_in(tmp_path / "x")
    else:
        [vectors] = words_in(tmp_path / "x").values()
        assert [part.shape[-1] for part in vectors] == [4, 8]


def test_mixed_alphas_become_one(model, tmp_path):
    one, two = random_lora(model, [OURS], rank=2, scale=0.5), random_lora(model, [TEXTS], rank=5, scale=0.25)
    mixed = Lora({**one.layers, **two.layers})
    lora_keys.write_kohya(tmp_path / "x", mixed, model)
    assert {value.item() for key, value in load_file(tmp_path / "x").items() if key.endswith(".alpha")} == {5.0}
    same(mixed, read_lora(tmp_path / "x", model))


@torch.no_grad()
def test_peft_reads_our_folder(config, model, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install .[test]")
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    lora = random_lora(model, ["attn2.to_k", "ff.net.0"])
    lora.layers |= random_lora(model, ["attn1.to_q"], rank=2, scale=2.0).layers
    by_name("peft").write(tmp_path / "lora", lora, Context(model))
    assert identify(tmp_path / "lora") == "diffusers"
    same(lora, read_lora(tmp_path / "lora", model))
    unet = diffusers.UNet2DConditionModel.from_config(diffusers_model.configurations(config.model.params)["unet"])
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    after = peft.PeftModel.from_pretrained(unet, tmp_path / "lora").merge_and_unload().state_dict()
    names = names_in(model, lora.layers, "diffusers")
    for layer, factors in lora.layers.items():
        name = names[layer].removeprefix("unet.") + ".weight"
        assert_close_to(after[name] - before[name], delta(factors), 1e-4)


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"lora_bias": True}, "a difference of its bias"), ({"modules_to_save": ["k_proj"]}, "modules_to_save"),
     ({"modules_to_save": ["k_proj"], "lora_bias": True}, "modules_to_save")],
)
def test_what_peft_trains_beside_the_factors(model, tmp_path, settings, told):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install .[test]")
    text = copy.deepcopy(model.cond_stage_model.transformer)
    wrapped = peft.get_peft_model(text, peft.LoraConfig(r=2, target_modules=["q_proj"], **settings))
    wrapped.save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(InputError, match=told):
        read_lora(tmp_path / "lora", model)
