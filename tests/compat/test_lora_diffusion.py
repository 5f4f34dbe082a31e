"""The Python interface of lora_diffusion: its reference numbers on the recorded network, and models of diffusers."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ldm.compat import lora_diffusion as ld
from ldm.errors import InputError
from ldm.interchange import cloneofsimo as cs
from ldm.interchange import diffusers_model
from ldm.interchange.lora import Factors, delta
from tests import interchange_models
from tests.helpers import assert_close_to
from tests.interchange.test_cloneofsimo import Toy, facts, group
from tests.interchange.test_lora_keys import their_output

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "lora"


@pytest.fixture(scope="module")
def tensors(folder):
    return load_file(folder / "tensors.safetensors")


@pytest.fixture
def toy(tensors):
    return Toy(group(tensors, "toy/unet/"))


class CLIPAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(10, 10), nn.Linear(10, 10)


class Text(nn.Module):
    def __init__(self, weights):
        super().__init__()
        self.self_attn, self.fc = CLIPAttention(), nn.Linear(10, 10)
        self.load_state_dict(weights)


def recorded_lora(tensors, model, scale=1.0):
    """The recorded factors in a network, as trained ones would be."""
    ld.inject_trainable_lora_extended(model)
    raw = group(tensors, "toy/lora/")
    for name, one in model.named_modules():
        if isinstance(one, (ld.LoraInjectedLinear, ld.LoraInjectedConv2d)):
            one.set_factors(raw[f"{name}/up"], raw[f"{name}/down"])
    ld.tune_lora_scale(model, scale)
    return model


def out(model, tensors):
    return model(tensors["toy/x"], tensors["toy/emb"], tensors["toy/context"])


@pytest.mark.parametrize("name", ["linear_nobias", "linear_bias", "conv3x3_s2p1", "conv1x1"])
def test_single_layers_have_the_published_numbers_and_names(tensors, folder, name):
    recorded, about = group(tensors, f"layer/{name}/"), facts(folder, "layers")[name]
    kind = {"lin": ld.LoraInjectedLinear, "conv": ld.LoraInjectedConv2d}[about["kind"]]
    layer = kind(**about["kwargs"], r=about["r"], scale=about["scale"]).eval()
    assert list(layer.state_dict()) == about["state_dict_keys"]
    assert not layer.lora_up.weight.any() and layer.lora_down.weight.std() < 1
    layer.load_state_dict({key: recorded[key] for key in about["state_dict_keys"]})
    assert_close_to(layer(recorded["x"]), recorded["y"])
    layer.set_selector_from_diag(recorded.get("selector_diag", torch.tensor([1.0, 0.0, -2.0, 0.5])))
    if "y_selector" in recorded:
        assert_close_to(layer(recorded["x"]), recorded["y_selector"])
    else:  # refused by the reference; here what a folded change of selected components gives
        branch, up = layer(recorded["x"]), layer.realize_as_lora()[0]
        layer.set_factors(up / about["scale"], layer.lora_down.weight)
        assert_close_to(layer(recorded["x"]), branch)
    with pytest.raises(ValueError, match="rank 100 must be from 1 to"):
        kind(**about["kwargs"], r=100)


def test_injection_leaves_the_output_and_gives_the_published_names(toy, tensors, folder):
    about = facts(folder, "toy")
    toy.requires_grad_(False)
    learning, names = ld.inject_trainable_lora(toy)
    assert names == about["inject_trainable_lora"]["names"] and len(learning) == 2 * len(names)
    assert {id(p) for group in learning for p in group} == {id(p) for p in toy.parameters() if p.requires_grad}
    assert torch.equal(out(toy.eval(), tensors), out(Toy(group(tensors, "toy/unet/")), tensors))
    ld.monkeypatch_remove_lora(toy)
    _, names = ld.inject_trainable_lora_extended(toy)
    assert names == about["inject_trainable_lora_extended"]["names"]
    found = {id(up): name for name, one in toy.named_modules() if (up := getattr(one, "lora_up", None))}
    order = [found[id(up)] for up, _ in ld.extract_lora_ups_down(toy, ld.UNET_EXTENDED_TARGET_REPLACE)]
    assert order == about["extract_order"]


def test_collapsing_and_removing_have_the_published_numbers(toy, tensors, folder):
    plain = out(toy, tensors)
    recorded_lora(tensors, toy, scale=0.7).eval()
    live = out(toy, tensors)
    ld.tune_lora_scale(toy, 0.0)
    assert_close_to(out(toy, tensors), plain)
    ld.tune_lora_scale(toy, 0.7)
    assert_close_to(out(toy, tensors), live)
    ld.collapse_lora(toy, 0.6)
    ld.monkeypatch_remove_lora(toy)
    classes = {name: type(toy.get_submodule(name)).__name__ for name in facts(folder, "toy")["classes_after_remove"]}
    assert classes == facts(folder, "toy")["classes_after_remove"]
    for name, value in group(tensors, "toy/collapsed0.6/").items():
        assert_close_to(toy.state_dict()[name], value)
    assert_close_to(out(toy, tensors), tensors["toy/out_collapsed0.6"])
    with pytest.raises(ValueError, match="No lora injected"):
        ld.extract_lora_ups_down(toy)


class Pipe:
    """The two networks of the reference as a pipeline."""

    def __init__(self, tensors):
        self.unet = Toy(group(tensors, "upl/base/unet/"))
        self.text_encoder = Text(group(tensors, "upl/base/text/"))


def test_a_published_file_in_a_pipeline(tensors, folder):
    """patch_pipe, collapse_lora with alpha, monkeypatch_remove_lora: the steps of the published `upl`."""
    for opened in (folder / "A.safetensors", safe_open(folder / "A.safetensors", framework="pt")):
        pipe = Pipe(tensors)
        ld.monkeypatch_or_replace_safeloras(pipe, opened)
        for model in (pipe.unet, pipe.text_encoder):
            ld.collapse_lora(model, 0.6)
            ld.monkeypatch_remove_lora(model)
        for part, model in (("unet", pipe.unet), ("text", pipe.text_encoder)):
            for name, value in group(tensors, f"upl/merged/{part}/").items():
                assert_close_to(model.state_dict()[name], value)
    assert {word: list(v.shape) for word, v in ld.load_safeloras_embeds(folder / "A.safetensors").items()} == {
        "<s1>": [12]
    }


def test_published_lists_are_patched_replaced_and_added(toy, folder):
    ld.monkeypatch_lora(toy, folder / "C_rank2.pt")
    ld.monkeypatch_or_replace_lora(toy, cs_list(folder / "A.pt"))  # of another rank: in its place
    a, b = cs.read_list(folder / "A.pt"), cs.read_list(folder / "B.pt")
    for (up, down), one in zip(ld.extract_lora_ups_down(toy), a, strict=True):
        assert torch.equal(up.weight, one.up.float()) and torch.equal(down.weight, one.down.float())
    ld.monkeypatch_add_lora(toy, folder / "B.pt", alpha=0.5, beta=2.0)
    for (up, down), one, two in zip(ld.extract_lora_ups_down(toy), a, b, strict=True):
        assert_close_to(up.weight, 2 * one.up.float() + 0.5 * two.up.float())
        assert_close_to(down.weight, 2 * one.down.float() + 0.5 * two.down.float())
    before = {name: value.clone() for name, value in toy.state_dict().items()}
    for wrong, message in (
        (cs_list(folder / "A.pt")[:-2], "4 pairs of factors for a model with 5 layers"),
        (cs_list(folder / "A.pt")[:-1], "up and down tensors by turns"),
        (cs_list(folder / "A.pt")[2:] + cs_list(folder / "A.pt")[:2], "do not fit attn.to_q"),
    ):
        with pytest.raises(InputError, match=message):
            ld.monkeypatch_or_replace_lora(toy, wrong)
    with pytest.raises(InputError, match="rank 4, got one of rank 2"):
        ld.monkeypatch_add_lora(toy, folder / "C_rank2.pt")
    assert all(torch.equal(before[name], value) for name, value in toy.state_dict().items())


def cs_list(path):
    return [tensor for one in cs.read_list(path) for tensor in (one.up, one.down)]


def test_files_hold_the_strength_where_published_ones_do(toy, tensors, tmp_path):
    recorded_lora(tensors, toy, scale=0.7)
    ld.save_safeloras({"unet": (toy, ld.UNET_EXTENDED_TARGET_REPLACE)}, tmp_path / "a.safetensors")
    ld.save_lora_weight(toy, tmp_path / "a.pt", ld.UNET_EXTENDED_TARGET_REPLACE)
    raw = group(tensors, "toy/lora/")
    (loras, ranks, classes) = ld.load_safeloras(tmp_path / "a.safetensors")["unet"]
    assert set(ranks) == {4} and set(classes) == ld.UNET_EXTENDED_TARGET_REPLACE
    assert_close_to(loras[0].float(), 0.7 * raw["res.conv1/up"], 1e-3)
    assert_close_to(cs.read_list(tmp_path / "a.pt")[0].up.float(), raw["res.conv1/up"], 1e-3)


# --- diffusers


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    config = interchange_models.small_config(tmp_path_factory.mktemp("clip"))
    model = interchange_models.small_model(config)
    path = tmp_path_factory.mktemp("diffusers") / "small"
    diffusers_model.write_folder(path, model.state_dict(), config.model.params)
    return model, path


@pytest.fixture
def pipeline(small):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    return diffusers.StableDiffusionPipeline.from_pretrained(small[1])


def trained(pipeline, seed, classes=ld.UNET_DEFAULT_TARGET_REPLACE):
    """A LoRA of random numbers in both models."""
    generator = torch.Generator().manual_seed(seed)
    for model, searched in ((pipeline.unet, classes), (pipeline.text_encoder, ld.TEXT_ENCODER_DEFAULT_TARGET_REPLACE)):
        learning, _ = ld.inject_trainable_lora(model, searched, r=3)
        for factor in learning:
            for parameter in factor:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        model.eval()


@pytest.mark.slow
def test_saved_with_words_loaded_tuned_and_removed(pipeline, small, tmp_path):
    plain = their_output(pipeline)
    trained(pipeline, 0)
    tuned = their_output(pipeline)
    pipeline.tokenizer.add_tokens("<s1>")
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer), mean_resizing=False)
    number = pipeline.tokenizer.convert_tokens_to_ids("<s1>")
    vector = pipeline.text_encoder.get_input_embeddings().weight[number].detach().clone()
    for path, safe in ((tmp_path / "x.safetensors", True), (tmp_path / "x.pt", False)):
        ld.save_all(pipeline.unet, pipeline.text_encoder, path, [number], ["<s1>"], safe_form=safe)
        fresh = type(pipeline).from_pretrained(small[1])
        assert_close_to(ld.patch_pipe(fresh, path)["<s1>"], vector)
        assert_close_to(their_output(fresh), tuned, 2e-3)
        ld.patch_pipe(fresh, path)  # once more: in its place, the word under its name
        table = fresh.text_encoder.get_input_embeddings().weight
        assert_close_to(table[fresh.tokenizer.convert_tokens_to_ids("<s1>")], vector)
        assert_close_to(their_output(fresh), tuned, 2e-3)
        ld.tune_lora_scale(fresh.unet, 0.0)
        text_alone = their_output(fresh)
        assert (text_alone - plain).abs().max() > 1e-4 and (text_alone - tuned).abs().max() > 1e-4
        ld.tune_lora_scale(fresh.text_encoder, 0.0)
        assert_close_to(their_output(fresh), plain)
        for model in (fresh.unet, fresh.text_encoder):
            ld.monkeypatch_remove_lora(model)
        assert_close_to(their_output(fresh), plain)
        assert not any("lora" in name for name in fresh.unet.state_dict())


@pytest.mark.slow
def test_layers_are_numbered_as_this_projects_own_files_are(pipeline, small, tmp_path):
    """A file of a diffusers model changes the same layers of LDM's model, and the other way round."""
    trained(pipeline, 1)
    path = tmp_path / "x.safetensors"
    ld.save_all(pipeline.unet, pipeline.text_encoder, path)
    lora = cs.to_lora(cs.read_safetensors(path), small[0], "x")
    from ldm.interchange.layers import dialects

    names, parts = dialects(small[0])["diffusers"], {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    assert len(lora.layers) > 20
    for name, factors in lora.layers.items():
        part, _, theirs = names[name].partition(".")
        root = parts[part]
        known = dict(root.named_modules())
        one = known.get(theirs) or known[theirs.removeprefix("text_model.")]
        assert_close_to(delta(factors), delta(Factors(one.lora_down.weight, one.lora_up.weight)).detach(), 3e-3)
    cs.write_safetensors(tmp_path / "back.safetensors", cs.from_lora(lora, small[0]))
    tuned = their_output(pipeline)
    fresh = type(pipeline).from_pretrained(small[1])
    ld.patch_pipe(fresh, tmp_path / "back.safetensors")
    assert_close_to(their_output(fresh), tuned, 2e-3)


@pytest.mark.slow
def test_several_loras_at_once(pipeline, small, tmp_path):
    """Changes add up, each with its strength; words are named by the file that they come from."""
    changes, width = [], pipeline.text_encoder.get_input_embeddings().weight.shape[1]
    for seed in (2, 3):
        one = type(pipeline).from_pretrained(small[1])
        trained(one, seed)
        models = {"unet": (one.unet, ld.UNET_DEFAULT_TARGET_REPLACE),
                  "text_encoder": (one.text_encoder, ld.TEXT_ENCODER_DEFAULT_TARGET_REPLACE)}  # fmt: skip
        ld.save_safeloras_with_embeds(
            models, {"<s1>": torch.full((width,), float(seed))}, tmp_path / f"{seed}.safetensors"
        )
        changes.append([delta(Factors(d, u)) for u, d in ld.extract_lora_as_tensor(one.unet)])
    manager = ld.LoRAManager([tmp_path / "2.safetensors", tmp_path / "3.safetensors"], pipeline)
    manager.tune([0.5, -2.0])
    found = [delta(Factors(d, u)) for u, d in ld.extract_lora_as_tensor(pipeline.unet)]
    for one, two, both in zip(*changes, found, strict=True):
        assert_close_to(both, 0.5 * one - 2.0 * two, 2e-3)
    assert manager.prompt("<1> beside <2>") == "<s0-0> beside <s1-0>"
    table = pipeline.text_encoder.get_input_embeddings().weight
    assert_close_to(table[pipeline.tokenizer.convert_tokens_to_ids("<s1-0>")], torch.full((width,), 3.0))
    with pytest.raises(InputError, match="expected 2 strengths"):
        manager.tune([1.0])
    manager.tune([0, 0], [0, 0])
    assert_close_to(their_output(pipeline), their_output(type(pipeline).from_pretrained(small[1])))
