"""LoRA files that name their layers, to and from diffusers, PEFT and kohya spellings; diffusers is the other side."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.config import load_config
from ldm.errors import InputError
from ldm.interchange import apply, cloneofsimo, diffusers_model, identify, layers, lora_keys, read_lora
from ldm.interchange.inspection import describe
from ldm.interchange.lora import Factors, Lora, delta, fitted
from ldm.interchange.names import TEXT, UNET
from tests import interchange_models
from tests.conftest import ROOT
from tests.helpers import assert_close_to

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(config):
    return interchange_models.small_model(config)


def random_lora(model, part_of_name, rank=3, scale=0.7, seed=5):
    """A LoRA of noticeable size on the layers whose names contain one of some words."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for part in layers.parts(model):
        for name, shape in layers.layers_of(model, part).items():
            if any(word in name for word in part_of_name):
                ones = (1,) * (len(shape) - 2)
                down = torch.randn(rank, *shape[1:], generator=generator) * shape[1:].numel() ** -0.5
                found[name] = Factors(down, torch.randn(shape[0], rank, *ones, generator=generator), scale)
    return Lora(found)


@pytest.fixture(scope="module")
def lora(model):
    """Attention of UNet and text encoder, a feed-forward, convolutions of two kinds."""
    return random_lora(model, ["attn", "ff.net.0", "input_blocks.4.0.in_layers", "proj_in", "upsample", ".conv"])


@pytest.fixture(scope="module")
def folder(config, model, tmp_path_factory):
    path = tmp_path_factory.mktemp("diffusers") / "small"
    diffusers_model.write_folder(path, model.state_dict(), config.model.params)
    return path


@pytest.fixture
def pipeline(folder):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install .[test]")
    pytest.importorskip("peft", reason="peft, which diffusers loads LoRAs with, is not installed: pip install .[test]")
    return diffusers.StableDiffusionPipeline.from_pretrained(folder)


@torch.no_grad()
def their_output(pipeline, seed=1):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    ids = pipeline.tokenizer(
        interchange_models.PROMPT, padding="max_length", max_length=32, truncation=True, return_tensors="pt"
    ).input_ids
    return pipeline.unet(x, torch.tensor([321]), pipeline.text_encoder(ids)[0]).sample


def same(one: Lora, two: Lora, tol=1e-6):
    assert one.layers.keys() == two.layers.keys()
    for name in one.layers:
        assert_close_to(delta(two.layers[name]), delta(one.layers[name]), tol)


def test_our_outputs_change_and_come_back(model, lora):
    before = interchange_models.unet_output(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    originals = apply.add(model, apply.lora_changes(lora, model))
    changed = interchange_models.unet_output(model)
    assert (changed - before).norm() > 0.1 * before.norm()
    apply.restore(model, originals)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("write", [lora_keys.write_diffusers, lora_keys.write_kohya])
def test_diffusers_loads_ours(model, lora, pipeline, tmp_path, write):
    write(tmp_path / "lora.safetensors", lora, model)
    before = their_output(pipeline)
    assert_close_to(before, interchange_models.unet_output(model), 1e-4)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    theirs = their_output(pipeline)
    pipeline.unload_lora_weights()
    assert torch.equal(their_output(pipeline), before)
    with apply.added(model, apply.lora_changes(lora, model)):
        ours = interchange_models.unet_output(model)
    assert (ours - before).norm() > 0.1 * before.norm()
    assert_close_to(theirs - before, ours - before, 1e-4)


def test_diffusers_loads_ours_of_mixed_ranks_and_scales(model, pipeline, tmp_path):
    """It reads mixed alphas of kohya's files wrongly, so ours have one."""
    kinds = (("attn1", 2, 0.5), ("attn2", 5, 0.25), ("self_attn", 3, 1.5))
    mixed = Lora({n: f for word, r, scale in kinds for n, f in random_lora(model, [word], r, scale).layers.items()})
    lora_keys.write_kohya(tmp_path / "lora.safetensors", mixed, model)
    before = their_output(pipeline)
    pipeline.load_lora_weights(tmp_path / "lora.safetensors")
    with apply.added(model, apply.lora_changes(mixed, model)):
        ours = interchange_models.unet_output(model)
    assert_close_to(their_output(pipeline) - before, ours - before, 1e-4)


def test_we_load_theirs(model, pipeline, tmp_path):
    from peft import LoraConfig

    settings = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
    pipeline.unet.add_adapter(settings)
    pipeline.text_encoder.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    before = interchange_models.unet_output(model)
    theirs = their_output(pipeline) - before
    unet, text = (get_peft_model_state_dict(part) for part in (pipeline.unet, pipeline.text_encoder))
    metadata = {"unet_lora_adapter_metadata": {"r": 4, "lora_alpha": 2}, "text_encoder_lora_adapter_metadata": None}
    type(pipeline).save_lora_weights(
        tmp_path, convert_state_dict_to_diffusers(unet), convert_state_dict_to_diffusers(text), **metadata
    )
    found = lora_keys.read(tmp_path / "pytorch_lora_weights.safetensors", model)
    assert {f.scale for name, f in found.layers.items() if name.startswith(UNET)} == {0.5}
    with apply.added(model, apply.lora_changes(found, model)):
        assert_close_to(interchange_models.unet_output(model) - before, theirs, 1e-4)


SETTINGS = [{"use_rslora": True}, {"alpha_pattern": {"attn1.to_q|attn2.to_v": 1}, "rank_pattern": {"to_v": 2}}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["rslora", "patterns"])
@pytest.mark.parametrize("writer", ["diffusers", "peft"])
def test_we_act_at_the_scale_of_theirs(model, pipeline, tmp_path, capsys, writer, settings):
    """PEFT's own folder says its scale in the JSON, diffusers' file in its metadata; `describe` reads the same."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False, **settings)
    before = interchange_models.unet_output(model)
    wrapped = get_peft_model(pipeline.unet, config)
    theirs = their_output(pipeline) - before
    if writer == "peft":
        wrapped.save_pretrained(path := tmp_path / "peft")
        assert identify(path) == "diffusers"
    else:
        tensors = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(wrapped).items()}
        metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
        type(pipeline).save_lora_weights(
            tmp_path, convert_state_dict_to_diffusers(tensors), unet_lora_adapter_metadata=metadata
        )
        path = tmp_path / "pytorch_lora_weights.safetensors"
    found = read_lora(path, model)
    with apply.added(model, apply.lora_changes(found, model)):
        assert_close_to(interchange_models.unet_output(model) - before, theirs, 1e-4)
    about, norms = describe(path), [delta(factors).norm() ** 2 for factors in found.layers.values()]
    assert about["scales"] == sorted({factors.scale for factors in found.layers.values()})
    assert about["norm of the change"] == pytest.approx(sum(norms).sqrt().item(), rel=1e-4)
    assert about["scales"] == ([4.0] if "use_rslora" in settings else [0.25, 0.5, 2.0, 4.0])


def test_pefts_own_file_without_its_folder_and_with_a_damaged_one(model, tmp_path):
    layer, factors = "base_model.model.{}.layers.0.self_attn.q_proj.lora_{}.weight", torch.ones(2, 24)
    for text in ("text_model.encoder", "encoder"):
        save_file({layer.format(text, "A"): factors, layer.format(text, "B"): factors.T.contiguous()}, tmp_path / "x")
        assert [f.scale for f in read_lora(tmp_path / "x", model).layers.values()] == [1]
    (tmp_path / "x").rename(tmp_path / "adapter_model.safetensors")
    for json in ("[", "[]", '{"lora_alpha": "many"}', '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}'):
        (tmp_path / "adapter_config.json").write_text(json)
        with pytest.raises(InputError, match="adapter_model.safetensors: PEFT's configuration is damaged"):
            read_lora(tmp_path, model)


@pytest.mark.parametrize("write", [lora_keys.write_diffusers, lora_keys.write_kohya])
def test_there_and_back(model, lora, tmp_path, write):
    write(tmp_path / "x.safetensors", lora, model)
    same(lora, lora_keys.read(tmp_path / "x.safetensors", model))


def test_kohya_keeps_alpha_and_factors(model, lora, tmp_path):
    lora_keys.write_kohya(tmp_path / "x.safetensors", lora, model)
    tensors = load_file(tmp_path / "x.safetensors")
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    assert tensors[f"{stem}.alpha"].item() == pytest.approx(0.7 * 3)
    ours = lora.layers[f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q"]
    assert torch.equal(tensors[f"{stem}.lora_up.weight"], ours.up)
    assert f"{TEXT}text_model.encoder.layers.0.self_attn.q_proj" in lora.layers
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in tensors


@pytest.mark.parametrize(
    ("stem", "down", "up"),
    [
        ("unet.{}.attn2.processor.to_out", "_lora.down.weight", "_lora.up.weight"),
        ("{}.attn2.processor.to_out", "_lora.down.weight", "_lora.up.weight"),
        ("unet.{}.attn2.to_out.0", ".lora.down.weight", ".lora.up.weight"),
        ("base_model.model.{}.attn2.to_out.0", ".lora_A.weight", ".lora_B.weight"),
        ("lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_out_0", ".lora_down.weight", ".lora_up.weight"),
    ],
)
def test_older_spellings(model, tmp_path, stem, down, up):
    stem = stem.format("up_blocks.1.attentions.2.transformer_blocks.0")
    name = f"{UNET}output_blocks.5.1.transformer_blocks.0.attn2.to_out.0"
    factors = random_lora(model, [name]).layers[name]._replace(scale=1.0)
    save_file({stem + down: factors.down, stem + up: factors.up}, tmp_path / "old.safetensors")
    same(Lora({name: factors}), lora_keys.read(tmp_path / "old.safetensors", model))


def test_older_text_encoder_spelling(model, tmp_path):
    stem = "text_encoder.text_model.encoder.layers.1.self_attn.k_proj.lora_linear_layer."
    save_file({stem + "down.weight": torch.ones(2, 24), stem + "up.weight": torch.ones(24, 2)}, tmp_path / "x")
    [name] = lora_keys.read(tmp_path / "x", model).layers
    assert name == f"{TEXT}text_model.encoder.layers.1.self_attn.k_proj"


@pytest.mark.parametrize("order", list(layers.ORDERS))
@pytest.mark.parametrize("fmt", ["safetensors", "pt"])
def test_nameless_files_in_every_order(model, tmp_path, order, fmt):
    """What the order of a file is follows from its shapes, where it is not said."""
    lora = random_lora(model, ["attn1", "attn2", "ff.net.0", "self_attn"])
    published = cloneofsimo.from_lora(lora, model, order)
    published.order = None
    getattr(cloneofsimo, f"write_{fmt}")(tmp_path / f"x.{fmt}", published)
    back = getattr(cloneofsimo, f"read_{fmt}")(tmp_path / f"x.{fmt}")
    same(lora, cloneofsimo.to_lora(back, model, "x"), 2e-3)


def test_nameless_files_with_residual_blocks_and_with_gaps(model, tmp_path):
    lora = random_lora(model, ["in_layers", "emb_layers", "attn2.to_v"])
    cloneofsimo.write_safetensors(tmp_path / "x.safetensors", cloneofsimo.from_lora(lora, model))
    back = cloneofsimo.to_lora(cloneofsimo.read_safetensors(tmp_path / "x.safetensors"), model, "x")
    assert all(delta(f).abs().max() == 0 for name, f in back.layers.items() if name not in lora.layers)
    same(lora, Lora({name: back.layers[name] for name in lora.layers}), 2e-3)


def test_the_search_finds_in_diffusers_what_we_think_it_does(model, pipeline):
    """The order of the installed diffusers' modules is the newest of ours, and sorting LDM's names gives it."""
    for classes in (["Attention", "GEGLU"], ["Attention", "GEGLU", "ResnetBlock2D"]):
        theirs = [f"unet.{name}" for name in layers.find_layers(pipeline.unet, classes)]
        ours = layers.in_order(model, "unet", [*classes, "CrossAttention"], "diffusers-new")
        names = layers.dialects(model)["diffusers"]
        assert [names[name] for name in ours] == theirs


def test_a_skeleton_takes_no_weights(recwarn):
    """SD-mini's text encoder has its own file, of which a model without numbers can copy nothing."""
    model = layers.skeleton(load_config(ROOT / "configs/sd-mini/inference.yaml"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not [warning for warning in recwarn if "meta" in str(warning.message)]


def test_refusals(model, lora, tmp_path):
    save_file({f"lora_unet_nowhere.lora_{x}.weight": torch.zeros(1, 1) for x in ("up", "down")}, tmp_path / "x")
    with pytest.raises(InputError, match="1 unknown keys, e.g. lora_unet_nowhere;"):
        lora_keys.read(tmp_path / "x", model)
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q."
    save_file(
        {stem + "lora_A.weight": torch.zeros(2, 320), stem + "lora_B.weight": torch.zeros(320, 2)}, tmp_path / "x"
    )
    with pytest.raises(InputError, match=r"another base model: .*attn1.to_q changes a weight of \[320, 320\]"):
        lora_keys.read(tmp_path / "x", model)
    stray = {f"{UNET}input_blocks.1.1.proj_in.lora_{x}.default.weight": torch.zeros(1, 1) for x in "AB"}
    save_file(stray, tmp_path / "x")  # a file out of one of our folders, whose alphas are in the JSON beside it
    with pytest.raises(InputError, match="1 unknown keys, e.g. model.diffusion_model.input_blocks.1.1.proj_in"):
        lora_keys.read(tmp_path / "x", model)
    save_file(
        {stem + "lora_A.weight": torch.zeros(0, 320), stem + "lora_B.weight": torch.zeros(320, 0)}, tmp_path / "x"
    )
    with pytest.raises(InputError, match=r"attn1.to_q has rank 0, which changes nothing; the file is damaged"):
        lora_keys.read(tmp_path / "x", model)
    save_file({stem + "hada_w1_a": torch.zeros(2, 320)}, tmp_path / "x")
    with pytest.raises(InputError, match="hada_w1_a"):
        lora_keys.read(tmp_path / "x", model)
    with pytest.raises(InputError, match="rank 2 in its down and 3 in its up"):
        fitted(Factors(torch.zeros(2, 4), torch.zeros(4, 3)), (4, 4), "a", "b")
    wide = cloneofsimo.Published({"unet": [Factors(torch.zeros(1, 320), torch.zeros(320, 1))] * 144}, {})
    with pytest.raises(InputError, match="another base model"):
        cloneofsimo.to_lora(wide, model, "wide.pt")
    with pytest.raises(InputError, match="no place for 1 layers, e.g. model.diffusion_model.input_blocks.0.0"):
        cloneofsimo.from_lora(random_lora(model, ["input_blocks.0.0"]), model)
