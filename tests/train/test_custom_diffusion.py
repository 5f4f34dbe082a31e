"""Custom Diffusion: what learns, the masked loss, pictures and prompts, concepts, the published YAML, whole runs."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm.config import instantiate_from_config, load_config
from ldm.data.custom import LARGE, OBJECT_TEMPLATES, SMALL, MaskBase, read_concepts
from ldm.errors import InputError
from ldm.models.building import skip_init
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.training import mask_of
from ldm.train.datamodule import DataModuleFromConfig
from tests import runs
from tests.conftest import ROOT
from tests.helpers import assert_close_to
from tests.tuned_models import config

pytestmark = pytest.mark.slow

CUSTOM = {"target": "src.model.CustomDiffusion"}
SMALL_RUN = """
checkpoint: {path: null, random_seed: 0}
model:
  params:
    image_size: 8
    unet_config:
      params:
        {image_size: 8, model_channels: 32, attention_resolutions: [1], num_res_blocks: 1, channel_mult: [1, 2],
         num_heads: 2}
    first_stage_config: {params: {ddconfig: {resolution: 32, ch: 32, ch_mult: [1, 1, 1], num_res_blocks: 1}}}
data: {params: {num_workers: 0, train: {params: {size: 32}}, train2: {params: {size: 32}}}}
lightning:
  modelcheckpoint: {params: {every_n_train_steps: 4}}
  callbacks: {image_logger: {params: {steps: 2, batch_frequency: 4}}}
  trainer: {max_steps: 4, log_every_n_steps: 1}
"""  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Photographs and class pictures of two concepts, and a config that makes runs small."""
    work = tmp_path_factory.mktemp("custom")
    for number, name in enumerate(("dog", "cat", "dogs", "cats")):
        runs.pictures(work / name, 3 + number % 2, seed=number)
    (work / "small.yaml").write_text(SMALL_RUN)
    return work


def concept(work, word="<new1>", kind="dog"):
    return [
        "--datapath", work / kind, "--caption", f"{word} {kind}",
        "--reg_datapath", work / f"{kind}s", "--reg_caption", kind,
    ]  # fmt: skip


def run(work, name, config, *more):
    runs.main_dream_booth(
        "--base", ROOT / f"configs/sd-mini/{config}.yaml", work / "small.yaml", "-t", "--accelerator", "cpu",
        "--logdir", work / "logs", "-n", name, *more,
    )  # fmt: skip
    return runs.find_run(work, name)


# --- what learns


def custom(unet=None, **params):
    built = config(unet=unet)["model"]["params"] | params
    built.pop("tuning")
    built["cond_stage_config"] = built["cond_stage_config"] | {"target": "src.custom_modules.FrozenCLIPEmbedderWrapper"}
    built["cond_stage_config"]["params"] = built["cond_stage_config"]["params"] | {"modifier_token": "<new1>"}
    return instantiate_from_config(CUSTOM | {"params": built})


@pytest.mark.parametrize("freeze_model", ["crossattn-kv", "crossattn"])
@pytest.mark.parametrize("add_token", [False, True])
def test_the_published_parameters_learn(golden, freeze_model, add_token):
    key = f"freeze_model={freeze_model}, cond_stage_trainable={add_token}, add_token={add_token}"
    published = json.loads((golden / "custom_diffusion/trainable_tiny.json").read_text())[key]["optimizer_params"]
    constructor = json.loads((golden / "unet/index.json").read_text())["constructor"] | {"context_dim": 128}
    tuned = custom(constructor, freeze_model=freeze_model, cond_stage_trainable=add_token, add_token=add_token)
    # The published code keeps new tokens as rows of the embedding table, of which it clears all other gradients.
    table = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    ours = [table if ".new_tokens." in name else name for name in tuned.trainable_parameters()]
    assert ours == published


def test_the_published_parameters_learn_at_full_size(golden):
    published = json.loads((golden / "custom_diffusion/trainable_full_size.json").read_text())
    with skip_init():
        unet = instantiate_from_config(
            load_config(ROOT / "configs/stable-diffusion/v1-model.yaml").model.params.unet_config
        )
    holder = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"diffusion_model": unet})})
    from ldm.tuning import Tuning
    from ldm.tuning.cross_attention import CrossAttention

    holder.tuning = Tuning(holder)

    for part in ("crossattn-kv", "crossattn"):
        learning = CrossAttention(part).trainable(holder)
        assert {name: list(value.shape) for name, value in learning.items()} == published[part]


def test_the_text_encoder_learns_where_no_token_does():
    names = set(custom(cond_stage_trainable=True).trainable_parameters())
    assert any(name.startswith("cond_stage_model.transformer.") for name in names)
    assert not any(name.startswith("cond_stage_model.") for name in custom().trainable_parameters())


@pytest.mark.parametrize(
    "params,message",
    [
        ({"freeze_model": "crossattn_kv"}, "freeze_model must be one of crossattn-kv, crossattn, got 'crossattn_kv'"),
        (
            {"add_token": True, "cond_stage_config": config()["model"]["params"]["cond_stage_config"]},
            "name the words as",
        ),
    ],
)
def test_refusals(params, message):
    built = config()["model"]["params"] | params
    built.pop("tuning")
    with pytest.raises(InputError, match=message):
        instantiate_from_config(CUSTOM | {"params": built})


# --- the masked loss


@pytest.mark.parametrize("case", ["mask", "ones_mask", "no_mask"])
@pytest.mark.parametrize("as_published", [True, False])
def test_masked_loss(golden, case, as_published):
    data = load_file(golden / "custom_diffusion/masked_loss.safetensors")
    expected = json.loads((golden / "custom_diffusion/masked_loss.json").read_text())["cases"][case]["total"]
    params = config()["model"]["params"] | {"timesteps": 1000, "mask_as_published": as_published}
    masks = {"mask": data["mask"], "ones_mask": torch.ones_like(data["mask"]), "no_mask": None}
    loss, _ = LatentDiffusion(**params).loss_of(data["model_output"], data["x0"], data["noise"], data["t"], masks[case])
    assert_close_to(loss, expected / (1 if as_published or case == "no_mask" else 4), 1e-5)


def test_a_mask_of_ones_changes_nothing_by_default():
    from ldm.models.diffusion.losses import simple_loss

    prediction, target = torch.randn(2, 3, 4, 8, 8)
    mask = torch.ones(3, 1, 8, 8)
    assert_close_to(simple_loss(prediction, target, mask=mask), simple_loss(prediction, target), 1e-6)


def test_a_latent_counts_where_all_its_pixels_do():
    mask = torch.zeros(1, 16, 16)
    mask[:, 3:12, 4:13] = 1
    latents = mask_of({"mask": mask}, torch.Size([4, 4]))
    expected = torch.zeros(1, 1, 4, 4)
    expected[0, 0, 1:3, 1:3] = 1
    assert torch.equal(latents, expected)


def test_what_is_outside_the_mask_does_not_matter():
    model = LatentDiffusion(**config()["model"]["params"])
    t, mask = torch.tensor([3]), torch.zeros(1, 1, 8, 8)
    mask[..., :4, :4] = 1
    x, noise, predicted = torch.randn(3, 1, 4, 8, 8)
    other = torch.where(mask.bool(), predicted, torch.randn_like(predicted))
    losses = [model.loss_of(p, x, noise, t, mask)[0] for p in (predicted, other)]
    assert torch.equal(*losses) and losses[0] != model.loss_of(predicted, x, noise, t)[0]


# --- pictures


def test_captions_say_how_the_picture_was_scaled(work):
    drawn = MaskBase(str(work / "dog"), "<new1> dog", size=48, seed=3)
    kinds = {"small": 0, "placed": 0, "large": 0}
    for k in range(120):
        item = drawn[k]
        side = item["mask"].any(0).sum().item()
        assert item["image"].shape == (48, 48, 3) and item["mask"].sum() == side**2
        plain = item["caption"]
        for words in SMALL + LARGE:
            plain = plain.removeprefix(words)
        assert plain in [template.replace("{}", "<new1> dog") for template in OBJECT_TEMPLATES]
        assert item["caption"].startswith(SMALL) == (side < 0.6 * 48)
        assert not item["image"][item["mask"] == 0].any()
        kinds["small" if side < 0.6 * 48 else "large" if item["caption"].startswith(LARGE) else "placed"] += 1
    # Two in three are shrunk, to between 1/3 and 1: 4/10 of them below 0.6. Four standard deviations are about 20.
    assert all(
        abs(kinds[kind] - share * 120) < 20 for kind, share in {"small": 4 / 15, "placed": 0.4, "large": 1 / 3}.items()
    )


def test_draws_are_a_function_of_seed_and_number(work):
    make = lambda seed: MaskBase(str(work / "dog"), "a", str(work / "dogs"), "b", size=32, seed=seed)  # noqa: E731
    first, again, other = make(0), make(0), make(1)
    forwards, backwards = [first[k] for k in range(20)], [again[k] for k in reversed(range(20))][::-1]
    assert all(
        torch.equal(a["image"], b["image"]) and a["caption"] == b["caption"]
        for a, b in zip(forwards, backwards, strict=True)
    )
    assert any(not torch.equal(a["image"], other[k]["image"]) for k, a in enumerate(forwards))


def test_concept_and_class_alternate_and_the_class_is_not_rescaled(work):
    drawn = MaskBase(str(work / "dog"), "<new1> dog", str(work / "dogs"), "dog", size=32, flip_p=0)
    assert len(drawn) == 2 * 3
    for k in range(12):
        assert ("<new1>" in drawn[k]["caption"]) == (k % 2 == 0)
    own = {drawn[k]["image"].sum().item() for k in range(1, 7, 2)}
    assert len(own) == 3 and own == {drawn[k]["image"].sum().item() for k in range(7, 13, 2)}
    assert all(drawn[k]["mask"].all() for k in range(1, 12, 2))


def test_captions_and_pictures_from_text_files(work, tmp_path):
    (tmp_path / "captions.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "paths.txt").write_text("\n".join(str(work / "dog" / f"{i}.png") for i in range(3)))
    drawn = MaskBase(str(tmp_path / "paths.txt"), str(tmp_path / "captions.txt"), size=32, aug=False)
    assert {drawn[k]["caption"] for k in range(3)} == {"one", "two", "three"}
    (tmp_path / "captions.txt").write_text("one\n")
    with pytest.raises(InputError, match="has 1 captions for the 3 pictures of"):
        MaskBase(str(work / "dog"), str(tmp_path / "captions.txt"))


@pytest.mark.parametrize(
    "params,message",
    [
        ({"datapath": None}, "a concept needs --datapath"),
        ({"caption": ""}, "and --caption"),
        ({"datapath": "nowhere"}, "the folder nowhere does not exist"),
        ({"reg_datapath": "dogs"}, "needs --reg_caption"),
        ({"size": "big"}, "size: expected a number of pixels"),
        ({"flip_p": 2}, "flip_p: expected a probability"),
        ({"interpolation": "cubic"}, "interpolation: expected one of"),
    ],
)
def test_pictures_that_cannot_be_used(work, params, message):
    with pytest.raises(InputError, match=message):
        MaskBase(**{"datapath": str(work / "dog"), "caption": "dog"} | params)


# --- concepts


def test_concepts_from_a_file_with_our_keys_or_those_of_diffusers(work, tmp_path):
    dog, cat = str(work / "dog"), str(work / "cat")
    (tmp_path / "list.json").write_text(
        json.dumps(
            [{"datapath": dog, "caption": "<new1> dog"}, {"instance_data_dir": cat, "instance_prompt": "a <new2>"}]
        )
    )
    ours, theirs = read_concepts(tmp_path / "list.json")
    assert ours == {"datapath": dog, "caption": "<new1> dog"}
    assert MaskBase(**theirs, aug=False, size=32)[0]["caption"] == "a <new2>"


@pytest.mark.parametrize(
    "content,message",
    [
        ("{", "is damaged: no valid JSON"),
        ("{}", "expected a JSON list of mappings"),
        ('[{"datapath": "DOG", "caption": "dog", "prompt": "a"}]', "concept 1 has the unknown key prompt"),
        ('[{"datapath": "DOG"}]', "concept 1 lacks its folder of pictures or its caption"),
        (
            '[{"datapath": "DOG", "caption": "dog"}, {"datapath": "away", "caption": "a"}]',
            "away of concept 2 does not exist",
        ),
    ],
)
def test_lists_of_concepts_that_are_refused(work, tmp_path, content, message):
    (tmp_path / "list.json").write_text(content.replace("DOG", str(work / "dog")))
    with pytest.raises(InputError, match=message):
        read_concepts(tmp_path / "list.json")


def test_options_that_do_not_go_together(work):
    base = ["--base", ROOT / "configs/sd-mini/custom-diffusion-addtoken.yaml"]
    with pytest.raises(InputError, match="got 1 times --datapath, 2 times --caption"):
        runs.main_dream_booth(*base, "--datapath", work / "dog", "--caption", "a", "--caption", "b")
    with pytest.raises(InputError, match="names the concepts; leave --datapath out"):
        runs.main_dream_booth(*base, "--datapath", work / "dog", "--concepts_list", "list.json")
    with pytest.raises(InputError, match="no photographs: name their folder with --datapath and --caption"):
        runs.main_dream_booth(*base)
    with pytest.raises(InputError, match="--modifier_token is for Custom Diffusion"):
        runs.main_dream_booth("--base", runs.TINY, "--data_root", work / "dog", "--modifier_token", "<new1>")


def test_concepts_are_drawn_together(work):
    target = "src.finetune_data.MaskBase"
    sets = [
        {"target": target, "params": {"datapath": str(work / kind), "caption": kind, "size": 32}}
        for kind in ("dog", "cat")
    ]
    as_list = DataModuleFromConfig(2, train=sets, num_workers=0)
    published = DataModuleFromConfig(2, train=sets[0], train2=sets[1], num_workers=0)
    for data in (as_list, published):
        data.setup()
        dog, cat = data.datasets["train"][5]
        assert dog["caption"].endswith("dog") and cat["caption"].endswith("cat")
        assert len(data.captions()) == 2
    with pytest.raises(InputError, match="several have class pictures of their own"):
        DataModuleFromConfig(2, train=sets, reg=sets[0])


# --- the published YAML, and whole runs


def test_published_yaml_builds_unchanged(golden, work, tmp_path):
    """At a smaller width, which only overrides numbers: every target and key is that of the published file."""
    published = json.loads((golden / "manifests/published_configs.json").read_text())
    small = OmegaConf.create(SMALL_RUN)
    text = {"version": str(ROOT / "models/sd-mini/clip"), "max_length": 32}
    small.model.params.cond_stage_config = {"params": text}
    small.model.params.unet_config.params.context_dim = 128
    found = [name for name in published if name.startswith("custom-diffusion/")]
    assert len(found) == 6
    for name in found:
        whole = OmegaConf.merge(published[name], small)
        model = instantiate_from_config(whole.model)
        words = any(".new_tokens." in key for key in model.trainable_parameters())
        assert words == ("add_token" in published[name]["model"]["params"])
        for key in ("train", "train2"):
            whole.data.params[key].params.update({"datapath": str(work / "dog"), "caption": "dog"})
        data = instantiate_from_config(whole.data)
        data.setup()
        assert len(data.datasets["train"][0]) == 2


def test_two_concepts_stop_and_go_on_without_a_trace(work):
    words = ["--modifier_token", "<new1>+<new2>", "--init_word", "dog+cat"]
    both = [*concept(work), *concept(work, "<new2>", "cat"), *words]
    whole = run(work, "whole", "custom-diffusion-joint", *both)
    parts = run(work, "parts", "custom-diffusion-joint", *both, "--max_steps", 2)
    runs.resume(parts, "--max_steps", 4)
    for key in ("state_dict", "optimizer_states"):
        assert runs.differences(runs.last(whole)[key], runs.last(parts)[key]) == []
    names = runs.last(whole)["state_dict"]
    assert len(names) == 2 + 8 and (whole / "images" / "000004.png").is_file()
    folder = whole / "checkpoints" / "4-adapters"
    prompt = ["--prompt", "a <new1> dog and a <new2> cat", "--n_iter", 1]
    sampling = work / "sampling.yaml"
    sampling.write_text(f"defaults: [{ROOT}/configs/sd-mini/custom-diffusion-joint.yaml, small.yaml]\n")
    (tuned,) = runs.sample(work / "tuned", *prompt, "--adapter_path", folder, config=sampling)
    (base,) = runs.sample(work / "base", *prompt, config=sampling)
    assert not torch.equal(runs.pixels(tuned), runs.pixels(base))


def test_concepts_keep_their_own_settings_on_a_resume(work):
    """A style beside an object: the templates of a style are those of the first concept alone."""
    words = ["--modifier_token", "<new1>+<new2>", "--init_word", "art+cat", "--max_steps", 1]
    made = run(work, "style", "custom-diffusion-style-joint", *concept(work), *concept(work, "<new2>", "cat"), *words)
    before = load_config(made / "configs" / "project.yaml").data
    runs.resume(made, "--max_steps", 2)
    assert load_config(made / "configs" / "project.yaml").data == before
    assert [bool(one.params.get("style")) for one in before.params.train] == [True, False]


def test_a_delta_draws_what_our_folder_draws(work):
    """The published files for sampling: `--delta_ckpt`, whose rows `--modifier_token` names, compressed or not."""
    made = run(work, "delta", "custom-diffusion-addtoken", *concept(work), "--init_word", "dog", "--max_steps", 2,
               "model.base_learning_rate=0.02")  # fmt: skip
    folder = made / "checkpoints" / "2-adapters"
    held = load_file(folder / "tuned.safetensors")
    rows = torch.cat([held.pop(name) for name in list(held) if ".new_tokens." in name])
    torch.save({"state_dict": held | {"embed": rows}}, work / "delta.ckpt")
    sampling = work / "one.yaml"
    sampling.write_text(f"defaults: [{ROOT}/configs/sd-mini/custom-diffusion-addtoken.yaml, small.yaml]\n")
    how = {"config": sampling}
    prompt = ["--prompt", "a <new1> dog", "--n_iter", 1]
    delta = ["--delta_ckpt", work / "delta.ckpt", "--modifier_token", "<new1>", "--compress"]
    pictures = {
        "folder": runs.sample(work / "a", *prompt, "--adapter_path", folder, **how),
        "delta": runs.sample(work / "b", *prompt, *delta, **how),
        "half": runs.sample(work / "c", *prompt, *delta, "--adapter_scale", 0.5, **how),
        "base": runs.sample(work / "d", *prompt, **how),
    }
    drawn = {name: runs.pixels(paths[0]) for name, paths in pictures.items()}
    assert (drawn["folder"] - drawn["delta"]).abs().max() <= 1
    assert not torch.equal(drawn["delta"], drawn["half"]) and not torch.equal(drawn["half"], drawn["base"])


def test_the_options_of_dreambooth_are_one_concept(work):
    roots = ["--data_root", work / "dog", "--reg_data_root", work / "filled", "--class_word", "dog"]
    one = run(work, "one", "custom-diffusion-addtoken", *roots, "--num_class_images", 2, "--max_steps", 1)
    stored = load_config(one / "configs" / "project.yaml")
    (only,) = stored.data.params.train
    assert only.params.caption == "<new1> dog" and only.params.reg_caption == "dog"
    assert len(list((work / "filled").glob("*.png"))) == 2
    about = json.loads((one / "checkpoints" / "1-adapters" / "adapter_config.json").read_text())
    assert about["identifier"] == "<new1>" and len(about["families"]) == 2
