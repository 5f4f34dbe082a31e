"""Custom Diffusion as diffusers' own script writes it, and Adobe's with a trained text encoder."""

import re

import pytest
import torch

from ldm.errors import InputError
from ldm.interchange import attn_procs, custom_diffusion, diffusers_model, identify, load_any, words_in
from ldm.interchange.custom_diffusion import EMBEDDINGS, Delta
from ldm.interchange.formats import Context
from ldm.interchange.names import TEXT
from tests import interchange_models
from tests.helpers import assert_close_to

torch.set_num_threads(1)
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")


@pytest.fixture
def model(config):
    return interchange_models.small_model(config)


@pytest.fixture(scope="module")
def unet_config(config):
    return diffusers_model.configurations(config.model.params)["unet"]


def their_unet(unet_config, model):
    unet = diffusers.UNet2DConditionModel.from_config(unet_config).eval().requires_grad_(False)
    unet.load_state_dict(diffusers_model.to_diffusers(model.state_dict())["unet"])
    return unet


@torch.no_grad()
def outputs(model, unet):
    """Ours and theirs for the same input."""
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 24, generator=generator)
    ours = model.model.diffusion_model(x, torch.tensor([321]), context)
    return ours, unet(x, torch.tensor([321]), context).sample


@pytest.mark.parametrize("train_q_out", [False, True], ids=["keys and values", "all"])
def test_a_file_of_diffusers(model, unet_config, tmp_path, train_q_out):
    """As `train_custom_diffusion.py` makes it: processors without parameters are empty mappings, words lie beside."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor as Processor

    unet, generator = their_unet(unet_config, model), torch.Generator().manual_seed(2)
    processors = {}
    for name, attention in ((n, unet.get_submodule(n.removesuffix(".processor"))) for n in unet.attn_processors):
        if "attn1" in name:
            processors[name] = Processor(train_kv=False, train_q_out=False, hidden_size=None, cross_attention_dim=None)
        else:
            wide, deep = attention.to_k.weight.shape
            own = Processor(train_kv=True, train_q_out=train_q_out, hidden_size=wide, cross_attention_dim=deep)
            for value in own.state_dict().values():
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
            processors[name] = own
    unet.set_attn_processor(processors)
    unet.save_attn_procs(tmp_path, safe_serialization=False)
    torch.save({"<new1>": torch.ones(24)}, tmp_path / "<new1>.bin")
    before, theirs = outputs(model, unet)
    assert identify(tmp_path) == identify(tmp_path / attn_procs.FILES[0]) == "delta-attn-procs"
    load_any(model, tmp_path)
    ours, _ = outputs(model, unet)
    assert (theirs - before).norm() > 0.05 * before.norm()
    assert_close_to(ours, theirs, 1e-4)
    assert list(model.cond_stage_model.new_tokens.words) == ["<new1>"]


def tuned(model, pattern=r"\.attn2\.to_[kv]\.weight$"):
    generator = torch.Generator().manual_seed(7)
    state = {n: v for n, v in model.state_dict().items() if re.search(pattern, n)}
    return {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


@pytest.mark.parametrize("pattern", [r"\.attn2\.to_[kv]\.weight$", r"\.attn2\."], ids=["keys and values", "all"])
def test_diffusers_reads_ours(model, unet_config, tmp_path, pattern):
    delta = Delta(tuned(model, pattern), {"<a/b>": torch.ones(1, 24)})
    files = attn_procs.write(tmp_path / "out", delta, Context(model))
    assert [file.name for file in files] == ["pytorch_custom_diffusion_weights.bin", "<a_b>.bin"]
    unet = their_unet(unet_config, model)
    before, _ = outputs(model, unet)
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler())  # without one, diffusers 0.42 loads nothing
    unet.load_attn_procs(tmp_path / "out", weight_name=attn_procs.FILES[0], _pipeline=pipeline)
    load_any(model, tmp_path / "out")
    ours, theirs = outputs(model, unet)
    assert (ours - before).norm() > 0.05 * before.norm()
    assert_close_to(ours, theirs, 1e-4)
    assert list(words_in(tmp_path / "out")) == ["<a/b>"]


def test_what_the_format_cannot_hold(model, tmp_path):
    keys = tuned(model)
    packed = custom_diffusion.compress(Delta(keys), model.state_dict())
    text = {EMBEDDINGS: model.state_dict()[EMBEDDINGS]}
    half = {name: value for name, value in keys.items() if ".to_k." in name}
    for delta, told in (
        (packed, "holds whole weights, and this delta is compressed"),
        (Delta(keys | text), "holds no weights outside the UNet"),
        (Delta(half), "attn2 has to_k.weight"),
        (Delta(keys, {"<s>": torch.ones(2, 24)}), "one vector for a word"),
    ):
        with pytest.raises(InputError, match=told):
            attn_procs.write(tmp_path / "out", delta, Context(model))
    assert not (tmp_path / "out").exists()
    attn_procs.write(tmp_path / "out", Delta(keys, {"<s>": torch.ones(1, 24)}), Context(model))
    with pytest.raises(InputError, match="out holds the word <s> of another delta"):
        attn_procs.write(tmp_path / "out", Delta(keys), Context(model))


# Adobe's layout with `text_encoder`, which is saved where that was trained, too.


def adobe(model, path, words=("<new1>",)):
    """A file as Adobe's `save_pretrained(save_text_encoder=True)` makes it: the table has rows for the new words."""
    text = {n.removeprefix(TEXT): v for n, v in tuned(model, r"transformer\..*(fc1\.bias|token_embedding)").items()}
    table = "text_model.embeddings.token_embedding.weight"
    rows = {word: torch.full((24,), float(number)) for number, word in enumerate(words)}
    text[table] = torch.cat([text[table], *(row[None] for row in rows.values())])
    text["text_model.embeddings.position_ids"] = torch.arange(4)[None]
    unet = custom_diffusion.in_diffusers_names(tuned(model))
    torch.save({"unet": unet, "modifier_token": rows, "text_encoder": text}, path)
    return text


def test_a_trained_text_encoder_is_part_of_the_delta(model, tmp_path):
    text = adobe(model, tmp_path / "delta.bin")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    load_any(model, tmp_path / "delta.bin", 0.5)
    for name, value in text.items():
        if "position_ids" not in name:
            old = before[TEXT + name]
            assert_close_to(model.state_dict()[TEXT + name], old + 0.5 * (value[: len(old)] - old), 1e-5)
    assert list(model.cond_stage_model.new_tokens.words) == ["<new1>"]


@pytest.mark.parametrize("kind", ["ldm", "diffusers"])
def test_a_trained_text_encoder_goes_into_both_layouts(model, tmp_path, kind):
    text = adobe(model, tmp_path / "delta.bin")
    delta = custom_diffusion.read(tmp_path / "delta.bin")
    assert {TEXT + name for name in text if "position_ids" not in name} <= delta.weights.keys()
    custom_diffusion.write(tmp_path / "back", delta, kind)
    back = custom_diffusion.read(tmp_path / "back")
    assert back.weights.keys() == delta.weights.keys() and list(back.tokens) == ["<new1>"]
    assert all(torch.equal(back.weights[name], value) for name, value in delta.weights.items())


def test_a_text_encoder_of_another_vocabulary_is_refused(model, tmp_path):
    text = adobe(model, tmp_path / "delta.bin")
    content = torch.load(tmp_path / "delta.bin", weights_only=True)
    rows = len(text["text_model.embeddings.token_embedding.weight"])
    torch.save(content | {"modifier_token": {}}, tmp_path / "delta.bin")
    with pytest.raises(InputError, match=f"has {rows} words, this model {rows - 1}; expected 0 more, the new ones"):
        load_any(model, tmp_path / "delta.bin")
    torch.save(content | {"text_encoder": [1]}, tmp_path / "delta.bin")
    with pytest.raises(InputError, match="text_encoder must hold weights by name"):
        load_any(model, tmp_path / "delta.bin")
