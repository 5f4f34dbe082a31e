"""Text encoders of Stable Diffusion 2.x and SDXL, tokenizers and SDXL's conditioner, against the published ones."""

import json

import pytest
import torch

from ldm.config import instantiate_from_config
from ldm.errors import InputError
from ldm.modules.encoders.conditioner import GeneralConditioner
from ldm.modules.encoders.modules import FrozenCLIPEmbedder, FrozenOpenCLIPEmbedder, FrozenOpenCLIPEmbedder2
from ldm.modules.encoders.open_clip import text_config
from ldm.modules.encoders.open_clip_tokenizer import OpenCLIPTokenizer
from ldm.modules.encoders.vocabulary import clip_vocabulary
from tests.helpers import assert_close_to
from tests.reference import below, index, tensors

SIZES = ("width", "heads", "layers", "embed_dim")
TINY = {"width": 8, "heads": 2, "layers": 2, "embed_dim": 6}


@pytest.fixture(scope="module")
def sd2(golden):
    folder = golden / "sd2"
    about = index(folder)["text"]
    return about, tensors(folder / "text.safetensors"), tensors(folder / "text_io.safetensors")


@pytest.fixture(scope="module")
def sdxl(golden, tmp_path_factory):
    """The conditioner of the reference, what it answered, and its description."""
    about = index(golden / "sdxl")["conditioner"]
    folder = tmp_path_factory.mktemp("clip")
    (folder / "config.json").write_text(json.dumps(about["clip_l"]))
    entries = json.loads(json.dumps(about["config"]))
    entries[0]["params"]["version"] = str(folder)
    entries[1]["params"]["arch"] = {name: about["open_clip"][name] for name in SIZES}
    conditioner = instantiate_from_config(
        {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": entries}}
    )
    weights = tensors(golden / "sdxl/conditioner.safetensors")
    conditioner.load_state_dict(below("conditioner.", weights))
    return conditioner, tensors(golden / "sdxl/conditioner_io.safetensors"), about, weights


def test_the_shipped_vocabulary_is_clips(golden):
    vocabulary, merges = clip_vocabulary()
    assert vocabulary == json.loads((golden / "clip_tokenizer/vocab.json").read_text())
    lines = (golden / "clip_tokenizer/merges.txt").read_text().splitlines()[1:]
    assert [" ".join(pair) for pair in merges] == lines


@pytest.mark.parametrize("layer", ["penultimate", "last"])
def test_the_encoder_of_sd2(sd2, layer):
    about, weights, io = sd2
    arch = {name: about["arch"][name] for name in (*SIZES, "context_length", "vocab_size")}
    encoder = FrozenOpenCLIPEmbedder(arch=arch, version="none", device="cpu", freeze=True, layer=layer)
    encoder.load_state_dict(below(about["key_prefix"], weights))
    texts = [prompt["text"] for prompt in about["prompts"]]
    assert torch.equal(encoder.tokenize(texts), io["token_ids"])
    assert_close_to(encoder(texts), io[layer])
    assert_close_to(encoder.encode(texts[0]), io[layer][:1])
    assert not any(p.requires_grad for p in encoder.parameters())


def test_the_conditioner_of_sdxl(sdxl):
    conditioner, io, about, _ = sdxl
    clip, open_clip = conditioner.embedders[:2]
    assert torch.equal(clip.tokenize(about["prompts"]), io["tokens.prompts_clip_l"])
    assert torch.equal(open_clip.tokenize(about["prompts"]), io["tokens.prompts_open_clip"])
    rows = [*about["texts"], about["empty"], about["negative"]]
    assert_close_to(clip(rows), io["clip_l.hidden_11"])
    hidden, pooled = open_clip(rows)
    assert_close_to(hidden, io["open_clip.penultimate"])
    assert_close_to(pooled, io["open_clip.pooled"])
    sizes = {name: io[name] for name in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")}
    batch = {"txt": about["texts"], **sizes}
    for side, text, zeroed in (
        ("uncond_zero", "", ["txt"]),
        ("uncond_empty", "", None),
        ("uncond_negative", about["negative"], None),
    ):
        cond, uncond = conditioner.get_unconditional_conditioning(batch, {"txt": [text] * 3, **sizes}, zeroed)
        for kind in ("crossattn", "vector"):
            assert_close_to(cond[kind], io[f"cond.{kind}"])
            assert_close_to(uncond[kind], io[f"{side}.{kind}"])


def test_both_spellings_of_clips_names_are_read(sdxl):
    conditioner, _, _, weights = sdxl
    own = below("conditioner.", weights)
    bare = {name.replace("text_model.", ""): value for name, value in own.items() if "position_ids" not in name}
    for state in (own, bare):
        conditioner.load_state_dict(state)
    assert conditioner.state_dict().keys() == own.keys()


def test_outputs_of_clip(sdxl):
    conditioner, io, about, _ = sdxl
    clip = conditioner.embedders[0]
    rows = [*about["texts"], about["empty"], about["negative"]]
    other = FrozenCLIPEmbedder(clip.version, layer="last", always_return_pooled=True)
    other.load_state_dict(clip.state_dict())
    last, pooled = other(rows)
    assert_close_to(last, io["clip_l.last_hidden_state"])
    ends = (io["token_ids_clip_l"] == 49407).int().argmax(1)
    assert torch.equal(pooled, last[range(5), ends])
    other = FrozenCLIPEmbedder(clip.version, layer="pooled")
    other.load_state_dict(clip.state_dict())
    assert torch.equal(other(rows), pooled[:, None])
    for wrong in ({"layer": "hidden"}, {"layer": "hidden", "layer_idx": 13}, {"layer": "first"}):
        with pytest.raises(InputError, match="layer"):
            FrozenCLIPEmbedder(clip.version, **wrong)


def test_clip_l_needs_no_files(monkeypatch):
    """The text is cleaned as the published tokenizer does."""
    with torch.device("meta"):
        clip = FrozenCLIPEmbedder()
    ids = {
        text: clip.tokenize(text)[0, :9].tolist()
        for text in ("a &amp; b", "a & b", "A  &\n b", "ａ & b", "a <x> &amp; b")
    }
    assert ids["a & b"] == [49406, 320, 261, 321, 49407, 49407, 49407, 49407, 49407]
    assert ids["a &amp; b"] == ids["A  &\n b"] == ids["ａ & b"] == ids["a & b"]
    # Beside a `<` ftfy takes HTML for markup; OpenCLIP unescapes it all the same.
    assert len(set(ids["a <x> &amp; b"])) == 9
    assert OpenCLIPTokenizer().encode("a < &amp;amp; b") == OpenCLIPTokenizer().encode("a < & b")


def test_markers_in_the_text():
    tokenizer = OpenCLIPTokenizer()
    assert tokenizer.encode("a<END_OF_TEXT>b") == [*tokenizer.encode("a"), 49407, *tokenizer.encode("b")]
    assert 49407 not in tokenizer.encode("<|endoftext|>")


def test_architectures_by_name_and_as_a_mapping():
    assert text_config("ViT-H-14") == text_config(
        {"embed_dim": 1024, "vision_cfg": {"layers": 32}, "text_cfg": {"width": 1024, "heads": 16, "layers": 24}}
    )
    assert text_config("ViT-bigG-14")["layers"] == 32 and text_config("ViT-L-14-quickgelu")["quick_gelu"]
    for wrong, message in (
        ("ViT-H-15", "did you mean ViT-H-16"),
        ({**TINY, "width": 0}, "width of arch must be a whole number"),
        ({**TINY, "depth": 2}, "depth of arch is unknown"),
        ({**TINY, "heads": 3}, "no multiple of its 3 heads"),
        ([1], "must be a name or a mapping"),
    ):
        with pytest.raises(InputError, match=message):
            text_config(wrong)


def test_layers_of_the_second_encoder():
    torch.manual_seed(0)
    plain = {"arch": TINY, "layer": "penultimate"}
    legacy, bare = FrozenOpenCLIPEmbedder2(**plain), FrozenOpenCLIPEmbedder2(**plain, legacy=False)
    bare.load_state_dict(legacy.state_dict())
    assert torch.equal(legacy("a cat"), legacy.model.ln_final(bare("a cat")))
    old = FrozenOpenCLIPEmbedder(**plain)
    old.load_state_dict(legacy.state_dict())
    assert torch.equal(old("a cat"), legacy("a cat"))
    with pytest.raises(InputError, match="needs legacy: false"):
        FrozenOpenCLIPEmbedder2(**plain, always_return_pooled=True)
    with pytest.raises(InputError, match="layer must be last or penultimate, got 'pooled'"):
        FrozenOpenCLIPEmbedder2(arch=TINY, layer="pooled")
    with pytest.raises(InputError, match="more than the 100 entries"):
        FrozenOpenCLIPEmbedder(arch={**TINY, "vocab_size": 100})("a cat")


def test_words_that_an_encoder_learns():
    torch.manual_seed(0)
    encoder = FrozenOpenCLIPEmbedder2(arch=TINY, legacy=False, layer="penultimate", always_return_pooled=True)
    cat = encoder.tokenize("cat")[0, 1]
    plain = encoder("a cat, here")
    encoder.add_token("<Toy>", encoder.token_embedding.weight[cat][None].clone())
    for told, before in zip(encoder("a <Toy>, here"), plain, strict=True):
        assert torch.equal(
            told, before
        )  # pooled at the end marker, whose id is no longer the last
    assert encoder.tokenizer("a <new0-0>", add_special_tokens=False).input_ids == [320, 49408]


def sizes_alone(**entry):
    target = "sgm.modules.encoders.modules.ConcatTimestepEmbedderND"
    return GeneralConditioner([{"target": target, "params": {"outdim": 4}, "input_key": "size", **entry}])


def test_dropping_for_guidance():
    torch.manual_seed(0)
    batch = {"size": torch.rand(200, 2) + 1}
    dropped = (sizes_alone(ucg_rate=0.5)(batch)["vector"] == 0).all(1)
    assert 60 < dropped.sum() < 140
    cond, uncond = sizes_alone(ucg_rate=1.0).get_unconditional_conditioning(batch)
    assert torch.equal(cond["vector"], uncond["vector"]) and cond["vector"].any(1).all()
    replaced = sizes_alone(ucg_rate=1.0, legacy_ucg_value=0.0)(batch)["vector"]
    assert torch.equal(replaced, sizes_alone()({"size": torch.zeros(200, 2)})["vector"])
    assert (batch["size"] >= 1).all()  # the caller's batch stays as it is


def test_entries_that_make_no_sense():
    with pytest.raises(InputError, match="emb_models.0: give input_key or input_keys"):
        GeneralConditioner([{"target": "torch.nn.Identity"}])
    with pytest.raises(InputError, match="ucg_rate must be from 0 to 1, got 2"):
        sizes_alone(ucg_rate=2)
    with pytest.raises(InputError, match="the batch has no 'size'"):
        sizes_alone()({"txt": ["a"]})
