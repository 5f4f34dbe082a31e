"""Diffusers' folders of Stable Diffusion 2.x, inpainting models and SDXL; the installed diffusers is the other side."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ldm.config import load_config, plain
from ldm.errors import InputError
from ldm.interchange import (
    apply,
    cloneofsimo,
    diffusers_json,
    diffusers_model,
    embeddings,
    identify,
    layers,
    load_any,
    lora_keys,
    names,
)
from ldm.interchange.base_files import base_weights
from ldm.interchange.lora import Factors, Lora, delta
from ldm.models import bases
from ldm.models.building import build_model, untuned
from ldm.modules.encoders.tokens import load_words
from tests.conftest import ROOT
from tests.helpers import assert_close_to
from tests.small_bases import TEXT, narrow

torch.set_num_threads(1)
PROMPT = "a photo of a cat, in 1990"  # without entities and odd letters, which transformers 5 does not clean
FILES = {
    "sd2": "sd2-inject-dreambooth/attn2o-ffni.yaml",
    "inpainting": "sd-inpaint-dreambooth/attn2o-ffni.yaml",
    "sdxl": "sdxl-inject-dreambooth/attn2o-ffni.yaml",
}
PIPELINES = {
    "sd2": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


def config_of(base, folder):
    """The config of a tiny base without adapters; both text encoders of SDXL are of its kinds."""
    config = untuned(load_config(narrow(FILES[base], folder)))
    params = config.model.params
    params.pop("train_level", None)
    if base == "sdxl":
        clip = folder / "clip"
        clip.mkdir()
        sizes = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        markers = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 1}
        own = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 16}
        (clip / "config.json").write_text(json.dumps({**sizes, **markers, **own}))
        entries = params.conditioner_config.params.emb_models
        entries[0].target = "sgm.modules.encoders.modules.FrozenCLIPEmbedder"
        entries[0].params = {"version": str(clip), "layer": "hidden", "layer_idx": 1}
        entries[1].params.arch = {**TEXT, "layers": 3, "embed_dim": 12}
        params.network_config.params.adm_in_channels = 12 + 6 * 8
    if base == "sd2":
        params.cond_stage_config.params.arch = {**TEXT, "layers": 3}
    return config


class Case:
    """A tiny base with random weights, none of them zero, its folder, and diffusers' pipeline of that folder."""

    def __init__(self, base, folder):
        import diffusers

        self.base, self.config = base, config_of(base, folder)
        params = self.config.model.params
        (params.get("network_config") or params.unet_config).params.pop("adapter_config", None)
        self.model = build_model(self.config, None, random_seed=0).eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for name, parameter in self.model.named_parameters():
                if parameter.dim() == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
                if "in_proj_weight" in name or "attn1.to_q" in name:
                    parameter.data *= 2
        self.folder = folder / "diffusers"
        diffusers_model.write_folder(self.folder, self.model.state_dict(), params)
        self.pipeline = getattr(diffusers, PIPELINES[base]).from_pretrained(self.folder)


@pytest.fixture(scope="module", params=FILES)
def case(request, tmp_path_factory):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def predictions(case):
    """(theirs, ours): what the UNets predict for fixed latents and the prompt as each side encodes it."""
    unet, generator = case.model.model.diffusion_model, torch.Generator().manual_seed(4)
    x, t = torch.randn(1, unet.in_channels, 8, 8, generator=generator), torch.tensor([321])
    (theirs, pooled), (ours, own) = text_of_theirs(case), text_of_ours(case)
    if case.base != "sdxl":
        return case.pipeline.unet(x, t, theirs).sample, unet(x, t, ours)
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32]])
    vector = case.model.conditions([PROMPT], (32, 32))[0]["vector"]
    assert torch.equal(vector[:, :12], own)
    added = {"text_embeds": pooled, "time_ids": sizes}
    return case.pipeline.unet(x, t, theirs, added_cond_kwargs=added).sample, unet(x, t, ours, vector)


def random_lora(model, rank=3, scale=0.7):
    """A LoRA of noticeable size: attention, feed-forward and convolutions of the UNet, all layers of text encoders."""
    generator, found = torch.Generator().manual_seed(5), {}
    for part in layers.parts(model):
        for name, shape in layers.layers_of(model, part).items():
            if part != "unet" or any(word in name for word in ("attn", "ff.net.0", "proj_in", "in_layers")):
                ones = (1,) * (len(shape) - 2)
                down = torch.randn(rank, *shape[1:], generator=generator) * shape[1:].numel() ** -0.5
                found[name] = Factors(down, 0.5 * torch.randn(shape[0], rank, *ones, generator=generator), scale)
    return Lora(found)


def text_of_theirs(case):
    """The context, and SDXL's pooled vector, that diffusers computes for the prompt."""
    pipeline = case.pipeline
    if case.base == "sdxl":
        context, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        return context, pooled
    return pipeline.encode_prompt(PROMPT, "cpu", 1, False)[0], None


def text_of_ours(case):
    if case.base != "sdxl":
        return case.model.get_learned_conditioning([PROMPT]), None
    cond = case.model.conditions([PROMPT], (32, 32))[0]
    return cond["crossattn"], cond["vector"][:, :12]


@torch.no_grad()
def test_text_encoders(case):
    (theirs, pooled), (ours, own) = text_of_theirs(case), text_of_ours(case)
    assert_close_to(theirs, ours, 1e-4)
    if pooled is not None:
        assert_close_to(pooled, own, 1e-4)


@torch.no_grad()
def test_the_unet(case):
    unet, generator = case.model.model.diffusion_model, torch.Generator().manual_seed(2)
    x = torch.randn(2, unet.in_channels, 8, 12, generator=generator)
    t, context = torch.tensor([3, 900]), torch.randn(2, 7, unet.context_dim, generator=generator)
    if case.base != "sdxl":
        assert_close_to(case.pipeline.unet(x, t, context).sample, unet(x, t, context), 1e-4)
        return
    pooled = torch.randn(2, 12, generator=generator)
    sizes = torch.tensor([[64, 48, 3, 5, 32, 40], [32, 32, 0, 0, 9, 8]])
    entries = case.model.conditioner.embedders[2:]
    vector = torch.cat([pooled, *(entry(pair) for entry, pair in zip(entries, sizes.chunk(3, 1), strict=True))], 1)
    added = {"text_embeds": pooled, "time_ids": sizes}
    theirs = case.pipeline.unet(x, t, context, added_cond_kwargs=added).sample
    assert_close_to(theirs, unet(x, t, context, vector), 1e-4)


@torch.no_grad()
def test_the_autoencoder_and_the_schedule(case):
    vae, own = case.pipeline.vae, case.model.first_stage_model
    x, z = torch.rand(1, 3, 32, 32) * 2 - 1, torch.randn(1, 4, 8, 8)
    assert_close_to(vae.encode(x).latent_dist.mode(), own.encode(x).mode(), 1e-4)
    assert_close_to(vae.decode(z).sample, own.decode(z), 1e-4)
    assert vae.config.scaling_factor == case.model.scale_factor
    assert_close_to(case.pipeline.scheduler.alphas_cumprod, case.model.alphas_cumprod, 1e-5)


def test_there_and_back(case, tmp_path):
    """From our folder, and from one that diffusers wrote; what a model does not compute is absent from a folder."""
    case.pipeline.save_pretrained(tmp_path / "theirs")
    prefixes = tuple(part.prefix for part in diffusers_model.base_of_layout(case.model.state_dict()).parts.values())
    state = {n: v for n, v in case.model.state_dict().items() if n.startswith(prefixes) and not bases.is_ignored(n)}
    unused = ("resblocks.2.", "text_projection") if case.base == "sd2" else ("logit_scale",)
    for folder in (case.folder, tmp_path / "theirs"):
        back = base_weights(folder, plain(case.config))
        assert {n for n in back if not bases.is_ignored(n)} == state.keys()
        assert all(torch.equal(back[n], state[n]) for n in state if not any(word in n for word in unused)), folder
        again = build_model(case.config, folder, read=lambda path: base_weights(path, case.config)).eval()
        assert_close_to(text_of_ours(case)[0], text_of_ours(Again(case, again))[0], 1e-6)
    assert diffusers_json.differences(case.folder, case.config.model.params) == []


class Again:
    def __init__(self, case, model):
        self.base, self.model = case.base, model


@pytest.mark.parametrize("case", ["sdxl"], indirect=True, scope="module")
def test_what_the_json_says_of_sdxl_counts(case):
    """A v-prediction SDXL in diffusers' layout: `--base auto` sets the config, another config is refused."""
    file = case.folder / "scheduler" / "scheduler_config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "prediction_type": "v_prediction"}))
    try:
        with pytest.raises(InputError, match="says prediction_type 'v_prediction' in scheduler"):
            base_weights(case.folder, case.config)
        changed = case.config.copy()
        for key, value in diffusers_json.adapted(case.folder, changed.model.params, "x").items():
            OmegaConf.update(changed.model.params, key, value)
        assert build_model(changed, None).parameterization == "v"
        assert base_weights(case.folder, changed)
    finally:
        file.write_text(before)


@pytest.mark.parametrize("name", [row.name for row in bases.BASES if row.pipeline])
def test_names_and_shapes_at_full_size(name):
    """On the meta device: each part has the names and shapes of diffusers' class for its JSON."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    base = next(row for row in bases.BASES if row.name == name)
    config = load_config(ROOT / base.config)
    state = layers.skeleton(plain(config)).state_dict()
    configs = diffusers_model.configurations(config.model.params, base)
    number = {n: configs[p.folder]["num_hidden_layers"] for n, p in diffusers_model.text_parts(base).items()}
    parts = diffusers_model.to_diffusers(state, "x", base, number)
    text = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}
    for part, place in base.parts.items():
        with torch.device("meta"):
            if place.cls in text:
                theirs = text[place.cls](CLIPTextConfig(**configs[place.folder])).state_dict()
            else:
                theirs = getattr(diffusers, place.cls).from_config(configs[place.folder]).state_dict()
        found, wanted = (
            {n.removeprefix("text_model."): list(v.shape) for n, v in side.items() if "position_ids" not in n}
            for side in (parts[part], theirs)
        )
        assert found == wanted
    assert not set(state) - set(diffusers_model.from_diffusers(parts, "x", base)) - {
        n for n in state if bases.is_ignored(n)
    }


WRITERS = {
    "diffusers": lora_keys.write_diffusers, "kohya": lora_keys.write_kohya,
    "comfyui": lambda path, lora, model: lora_keys.write_kohya(path, lora, model, "comfyui"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_a_lora_goes_there_and_back(case, tmp_path, kind):
    lora, file = random_lora(case.model), tmp_path / "lora.safetensors"
    WRITERS[kind](file, lora, case.model)
    assert identify(file) == kind
    back = lora_keys.read(file, case.model)
    assert back.layers.keys() == lora.layers.keys()
    assert all(torch.allclose(delta(back.layers[n]), delta(lora.layers[n]), atol=1e-6) for n in lora.layers)
    keys = {name.split(".lora_")[0] for name in load_file(file) if not name.endswith(".alpha")}
    assert NAMES[case.base][kind] <= keys


NAMES = {
    "sd2": {
        "diffusers": {"text_encoder.text_model.encoder.layers.1.self_attn.k_proj"},
        "kohya": {"lora_te_text_model_encoder_layers_1_self_attn_k_proj",
                  "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"},
        "comfyui": {"text_encoders.clip_h.transformer.text_model.encoder.layers.1.mlp.fc1"},
    },
    "inpainting": {"diffusers": set(), "kohya": set(), "comfyui": set()},
    "sdxl": {
        "diffusers": {"text_encoder_2.text_model.encoder.layers.2.self_attn.k_proj",
                      "text_encoder.text_model.encoder.layers.1.mlp.fc2",
                      "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_k"},
        "kohya": {"lora_te1_text_model_encoder_layers_1_mlp_fc2", "lora_te2_text_model_encoder_layers_2_mlp_fc2",
                  "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
                  "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_k"},
        "comfyui": {"text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
                    "text_encoders.clip_g.transformer.text_model.encoder.layers.0.self_attn.q_proj",
                    "diffusion_model.middle_block.1.transformer_blocks.1.attn2.to_k"},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_diffusers_acts_with_our_lora_as_we_do(case, tmp_path, kind):
    pytest.importorskip("peft", reason="peft, which diffusers loads LoRAs with, is not installed: pip install .[test]")
    lora, file = random_lora(case.model), tmp_path / "lora.safetensors"
    WRITERS[kind](file, lora, case.model)
    before, own = predictions(case)
    assert_close_to(before, own, 1e-4)
    case.pipeline.load_lora_weights(file)
    try:
        with apply.added(case.model, apply.lora_changes(lora, case.model)):
            theirs, ours = predictions(case)
            (text, pooled), (own_text, own_pooled) = text_of_theirs(case), text_of_ours(case)
    finally:
        case.pipeline.unload_lora_weights()
    assert (ours - before).norm() > 0.1 * before.norm()
    assert_close_to(text, own_text, 1e-4)
    if pooled is not None:
        assert_close_to(pooled, own_pooled, 1e-4)
    assert_close_to(theirs - before, ours - before, 1e-3)


def test_a_lora_that_diffusers_wrote(case, tmp_path):
    """PEFT's layers in each part, written by diffusers: its own spelling, with the scale in the metadata."""
    pytest.importorskip("peft", reason="peft, which diffusers loads LoRAs with, is not installed: pip install .[test]")
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = type(case.pipeline).from_pretrained(case.folder)
    before, told, weights = predictions(case)[1], {}, {}
    for part in ("unet", "text_encoder", "text_encoder_2")[: 3 if case.base == "sdxl" else 2]:
        layers_ = ["to_q", "to_v"] if part == "unet" else ["q_proj", "fc1"]
        config = LoraConfig(r=4, lora_alpha=2, target_modules=layers_, init_lora_weights=False)
        getattr(pipeline, part).add_adapter(config)
        own = get_peft_model_state_dict(getattr(pipeline, part))
        weights[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(own)
        told[f"{part}_lora_adapter_metadata"] = {"r": 4, "lora_alpha": 2}
    type(pipeline).save_lora_weights(tmp_path, **weights, **told)
    theirs, case.pipeline = case.pipeline, pipeline
    try:
        expected = predictions(case)[0]
    finally:
        case.pipeline = theirs
    load_any(case.model, tmp_path / "pytorch_lora_weights.safetensors")
    try:
        assert (expected - before).norm() > 0.05 * before.norm()
        assert_close_to(predictions(case)[1], expected, 1e-4)
    finally:
        apply.restore(case.model, dict(case.model.tuning.released))


@pytest.mark.parametrize("case", ["sd2"], indirect=True, scope="module")
def test_nameless_files_of_stable_diffusion_2(case, tmp_path):
    """cloneofsimo's, whose own example is this base: layers of both parts in the order of diffusers' modules."""
    whole = random_lora(case.model).layers
    lora = Lora({n: f for n, f in whole.items() if any(word in n for word in (".attn1.", ".attn2.", ".attn."))})
    file = tmp_path / "x.safetensors"
    cloneofsimo.write_safetensors(file, cloneofsimo.from_lora(lora, case.model))
    searched = [f"text_encoder.{n}" for n in layers.find_layers(case.pipeline.text_encoder, ["CLIPAttention"])]
    theirs = layers.dialects(case.model)["diffusers"]
    ordered = layers.in_order(case.model, "text_encoder", ["CLIPAttention"], "diffusers")
    plain_names = [name.replace("text_model.", "") for name in searched]
    assert [theirs[n].replace("text_model.", "") for n in ordered] == plain_names
    back = cloneofsimo.to_lora(cloneofsimo.read_safetensors(file), case.model, "x")
    assert all(delta(one).abs().max() == 0 for name, one in back.layers.items() if name not in lora.layers)
    for name, one in lora.layers.items():
        assert_close_to(delta(back.layers[name]), delta(one), 2e-3)


@pytest.mark.parametrize("case", ["sdxl"], indirect=True, scope="module")
@torch.no_grad()
def test_a_word_of_sdxl_means_the_same_in_diffusers(case, tmp_path):
    """`clip_l` and `clip_g` of one file, as scripts load them into the two text encoders."""
    generator, file = torch.Generator().manual_seed(6), tmp_path / "toy.safetensors"
    embeddings.write_diffusers(file, {"<toy>": tuple(torch.randn(2, 16, generator=generator) for _ in range(2))})
    held, pipeline = load_file(file), type(case.pipeline).from_pretrained(case.folder)
    for name, number in (("clip_l", ""), ("clip_g", "_2")):  # as diffusers' own script writes it
        save_file({"<toy>": held[name]}, tmp_path / f"learned_embeds{number}.safetensors")
    for name, end in (("clip_l", ""), ("clip_g", "_2")):
        parts = {part: getattr(pipeline, f"{part}{end}") for part in ("text_encoder", "tokenizer")}
        pipeline.load_textual_inversion({"<toy>": held[name]}, token="<toy>", **parts)
    model = build_model(case.config, None).eval()
    model.load_state_dict(case.model.state_dict())
    assert load_words(model, tmp_path, "--embedding_path") == ["<toy>"]
    theirs, _, pooled, _ = pipeline.encode_prompt("a photo of <toy> here", do_classifier_free_guidance=False)
    ours = model.conditions(["a photo of <toy> here"], (32, 32))[0]
    assert_close_to(theirs, ours["crossattn"], 1e-4)
    assert_close_to(pooled, ours["vector"][:, :12], 1e-4)


@pytest.mark.parametrize("name", ["sd_v1", "sd_v2", "sdxl_base"])
def test_the_layout_follows_from_the_names_of_attention_alone(golden, name):
    """Files of deltas hold no others. SDXL has no attention at its finest level."""
    keys = json.loads((golden / f"manifests/{name}_manifest.json").read_text())["keys"]
    unet = [key.removeprefix(names.UNET) for key in keys if key.startswith(names.UNET)]
    layout, attention = names.layout_of(unet), [key for key in unet if ".attn2." in key]
    assert names.layout_of_attention(attention) == layout
    theirs = names.translate_all(attention, names.unet_table(layout), name).values()
    assert names.layout_of_diffusers_attention(theirs) == layout
