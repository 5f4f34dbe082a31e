"""Custom Diffusion's files and the arithmetic on them, against the published numbers."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import InputError
from ldm.interchange import custom_diffusion as cd
from ldm.interchange.compose import compose, solve
from ldm.interchange.custom_diffusion import LowRank
from tests import interchange_models
from tests.helpers import assert_close_to

torch.set_num_threads(1)
RATIOS = ["0.6", "0.9"]


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "custom_diffusion"


@pytest.fixture(scope="module")
def delta_file(folder):
    return folder / "delta_epoch=000004.ckpt"


def test_the_published_delta(folder, delta_file):
    delta = cd.read(delta_file, ["<cat>"])
    expected = load_file(folder / "delta_epoch=000004.safetensors")
    assert torch.equal(delta.tokens["<cat>"], expected.pop("embed"))
    assert delta.weights.keys() == expected.keys()
    assert all(torch.equal(delta.weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["ldm", "diffusers"])
def test_there_and_back(delta_file, tmp_path, kind):
    delta = cd.read(delta_file)
    cd.write(tmp_path / "x.bin", delta, kind)
    back = cd.read(tmp_path / "x.bin")
    assert list(back.tokens) == ["<new1>"] and torch.equal(back.tokens["<new1>"], delta.tokens["<new1>"])
    assert back.weights.keys() == delta.weights.keys()
    assert all(torch.equal(back.weights[name], delta.weights[name]) for name in delta.weights)


def test_the_ldm_layout_is_written_as_published(delta_file, tmp_path):
    cd.write(tmp_path / "x.ckpt", cd.read(delta_file))
    theirs, ours = (torch.load(path, weights_only=True) for path in (delta_file, tmp_path / "x.ckpt"))
    assert list(theirs) == list(ours) == ["state_dict"]
    assert list(theirs["state_dict"]) == list(ours["state_dict"])
    assert all(torch.equal(theirs["state_dict"][name], ours["state_dict"][name]) for name in theirs["state_dict"])


def test_names_in_the_diffusers_layout_at_full_size(golden):
    facts = json.loads((golden / "custom_diffusion/trainable_full_size.json").read_text())["crossattn-kv"]
    delta = cd.Delta({name: torch.empty(shape, device="meta") for name, shape in facts.items()})
    names = list(cd.content_of(delta, "diffusers")["unet"])
    assert len(set(names)) == 32
    assert names[0] == "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert names[-1] == "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_v.weight"


def test_the_layout_of_diffusers_own_script(delta_file, tmp_path):
    delta = cd.read(delta_file)
    flat = {
        name.replace(".to_", ".processor.to_").replace(".weight", "_custom_diffusion.weight"): value
        for name, value in cd.content_of(delta, "diffusers")["unet"].items()
    }
    torch.save(flat, tmp_path / "x.bin")
    back = cd.read(tmp_path / "x.bin")
    assert all(torch.equal(back.weights[name], delta.weights[name]) for name in delta.weights)


def test_extract(folder, delta_file):
    facts = json.loads((folder / "get_deltas.json").read_text())
    published = cd.read(delta_file)
    checkpoint = dict(published.weights)
    for name in facts["freeze_model_crossattn"]["trained_but_not_saved"]:
        checkpoint[name] = torch.randn(3)
    checkpoint["model.diffusion_model.input_blocks.0.0.weight"] = torch.randn(3)
    checkpoint[cd.EMBEDDINGS] = torch.cat([torch.randn(5, 24), published.tokens["<new1>"]])
    assert facts["source_key_of_embed"] == cd.EMBEDDINGS
    ours = cd.content_of(cd.extract(checkpoint, facts["newtoken"]))["state_dict"]
    assert ours.keys() == facts["state_dict"].keys()
    assert all(torch.equal(ours[name], {**checkpoint, "embed": published.tokens["<new1>"]}[name]) for name in ours)
    assert set(cd.extract(checkpoint, 0).weights) == set(facts["freeze_model_crossattn"]["keys_saved"])
    everything = cd.extract(checkpoint, 0, "crossattn").weights.keys()
    assert everything - ours.keys() == set(facts["freeze_model_crossattn"]["trained_but_not_saved"])


@pytest.mark.parametrize("ratio", RATIOS)
def test_compress(folder, ratio, tmp_path):
    tensors = load_file(folder / "compress.safetensors")
    parts = {
        part: {n.partition("/")[2]: v for n, v in tensors.items() if n.startswith(part + "/")}
        for part in ("pretrained", "tuned", f"ratio{ratio}")
    }
    delta = cd.Delta(parts["tuned"], {"<new1>": tensors["embed"]})
    packed = cd.compress(delta, parts["pretrained"], float(ratio))
    cd.write(tmp_path / "x.ckpt", packed)
    packed = cd.read(tmp_path / "x.ckpt")
    entries = json.loads((folder / "compress.json").read_text())["ratios"][ratio]["entries"]
    assert entries.keys() == {*packed.weights, "embed"}
    full = cd.whole(packed, parts["pretrained"])
    for name, value in packed.weights.items():
        if "to_q" in name:
            assert torch.equal(value, parts["tuned"][name])
            continue
        assert isinstance(value, LowRank) and value.v.shape[0] == entries[name]["rank"]
        expected = parts[f"ratio{ratio}"]
        assert_close_to(value.u @ value.v, expected[f"{name}/u"] @ expected[f"{name}/v"], 1e-4)
        assert_close_to(full.weights[name], expected[f"{name}/W_reconstructed"], 1e-4)


def test_the_rank_rule():
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert [cd.kept_rank(values, ratio) for ratio in (0.3, 0.5, 0.7, 0.95, 1.0)] == [0, 1, 2, 3, 3]


def test_solve(folder):
    t = {name.partition("/")[2]: v for name, v in load_file(folder / "compose.safetensors").items()}
    ours = solve(t["W"], t["K"], t["K_target"], t["V_target"])
    assert_close_to(ours, t["W_out"], 1e-4)
    doubles = (t[name].double() for name in ("W", "K", "K_target", "V_target"))
    assert_close_to(solve(*doubles), t["W_out_float64"], 1e-9)
    assert_close_to(t["K_target"] @ ours.T, t["V_target"], 1e-5)


def test_compose_gives_each_concept_its_own_values(tmp_path):
    model = interchange_models.small_model(interchange_models.small_config(tmp_path))
    state = model.state_dict()
    pretrained = {name: value for name, value in state.items() if re.search(cd.SAVED["crossattn-kv"], name)}
    generator = torch.Generator().manual_seed(3)
    deltas = [
        cd.Delta(
            {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in pretrained.items()},
            {"<new1>": torch.randn(1, 24, generator=generator)},
        )
        for _ in range(2)
    ]
    regularization = [
        "a photo of a dog on the beach",
        "two cats in the snow",
        "a red house",
        "a man with a hat in a city",
    ]
    regularization += ["the moon over mountains at night", "a green backpack and a wooden clock"]
    encoder = model.cond_stage_model
    joint = compose(encoder, pretrained, deltas, ["cat", "teapot"], regularization)
    assert list(joint.tokens) == ["<new1>", "<new2>"]
    assert torch.equal(joint.tokens["<new2>"], deltas[1].tokens["<new1>"])
    with torch.no_grad():
        for delta, prompt in zip(deltas, ("<new1> cat", "<new2> teapot"), strict=True):
            features = encoder([prompt])[0, 1:3]  # the word and its category; the start is shared
            for name in joint.weights:
                assert_close_to(features @ joint.weights[name].T, features @ delta.weights[name].T, 1e-3)


def test_refusals(delta_file, tmp_path):
    delta = cd.read(delta_file)
    with pytest.raises(InputError, match="1 new words, --modifier_token names 2"):
        cd.read(delta_file, ["<a>", "<b>"])
    with pytest.raises(InputError, match="has no weight model.diffusion_model.input_blocks.1.1"):
        cd.changes(delta, {})
    wrong = {name: torch.zeros(2, 2) for name in delta.weights}
    with pytest.raises(InputError, match=r"another base model: .* has shape \[32, 24\], here \[2, 2\]"):
        cd.changes(delta, wrong)
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="no Custom Diffusion delta"):
        cd.read(tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="compression_ratio"):
        cd.compress(delta, delta.weights, 0.0)
    with pytest.raises(InputError, match="nothing to extract"):
        cd.extract({"a": torch.zeros(1)})
    with pytest.raises(InputError, match="2 deltas and 1 categories"):
        compose(None, {}, [delta, delta], ["cat"], ["a"])
    text = cd.Delta({**delta.weights, cd.EMBEDDINGS: torch.zeros(2, 2)})
    with pytest.raises(InputError, match="delta 2 changes the text encoder .*, which the closed form cannot compose"):
        compose(None, {}, [delta, text], ["cat", "dog"], ["a"])


def test_rounding_decides_nothing_where_few_rows_leave_the_weight_open():
    generator = torch.Generator().manual_seed(4)
    weight, regular, target, values = (
        torch.randn(*shape, generator=generator) for shape in ((6, 16), (5, 16), (2, 16), (2, 6))
    )
    exact = solve(weight, regular, target, values)
    near = solve(weight, regular + 1e-6 * torch.randn(5, 16, generator=generator), target, values)
    assert_close_to(target @ exact.T, values, 1e-4)
    assert_close_to(near, exact, 1e-2)
