"""lora_pti: the published arguments, both stages in one run, and a LoRA that the published format holds."""

import json

import pytest
import torch
from PIL import Image

from ldm.commands import Program, lora_pti
from ldm.config import instantiate_from_config
from ldm.errors import InputError
from ldm.interchange import cloneofsimo
from ldm.interchange.command import skeleton
from ldm.interchange.lora import delta
from tests.runs import TINY, pictures

pytestmark = pytest.mark.slow

torch.set_num_threads(1)


main = Program("lora-pti")


def arguments(tmp_path, *more):
    """A run of three steps of each stage on the tiny model."""
    config, base = tmp_path / "tiny.yaml", tmp_path / "base.safetensors"
    if not config.exists():
        from omegaconf import OmegaConf

        from ldm.checkpoints import save_safetensors
        from ldm.models.building import build_model

        plain = {"defaults": str(TINY), "model": {"params": {"unet_config": {"params": {"adapter_config": None}}}}}
        OmegaConf.save(OmegaConf.create(plain), config)
        from ldm.config import load_config

        save_safetensors(base, build_model(load_config(config), None, 0).state_dict())
    photos = pictures(tmp_path / "photos", 2)
    words = ["--instance_data_dir", photos, "--pretrained_model_name_or_path", base, "--output_dir", tmp_path / "out"]
    words += ["--config", config, "--device", "cpu", "--max_train_steps_ti", 3, "--max_train_steps_tuning", 3]
    return [str(word) for word in [*words, *more]]


def test_both_stages(tmp_path, capsys):
    more = ["--placeholder_tokens", "<s1>|<s2>", "--initializer_tokens", "dog|<rand-0.05>", "--use_template", "object"]
    more += ["--lora_rank", "2", "--learning_rate_unet=0.01", "--learning-rate-text=0.01", "--save_steps", "3"]
    main(arguments(tmp_path, *more))
    content = cloneofsimo.read_safetensors(tmp_path / "out/final_lora.safetensors")
    assert list(content.tokens) == ["<s1>", "<s2>"]
    found = cloneofsimo.to_lora(content, skeleton(tmp_path / "tiny.yaml"), "final")
    changed = {name for name, factors in found.layers.items() if delta(factors).abs().max() > 0}
    assert any(".attn2.to_out.0" in name for name in changed) and any(".ff.net.0.proj" in name for name in changed)
    assert any("self_attn.q_proj" in name for name in changed)
    assert "words <s1>, <s2>" in capsys.readouterr().out
    (run,) = (tmp_path / "out").glob("*_pti")
    first, last = (run / "checkpoints" / f"{step}-adapters/tuned.safetensors" for step in (3, 6))
    from safetensors.torch import load_file

    before, after = load_file(first), load_file(last)
    words = [name for name in before if "new_tokens" in name]
    assert len(words) == 2 and all(torch.equal(before[name], after[name]) for name in words)  # they learn only at first
    ups = [name for name in before if ".lora_B." in name]
    assert not any(before[name].any() for name in ups) and any(after[name].any() for name in ups)
    with pytest.raises(InputError, match="final_lora.safetensors exists"):
        main(arguments(tmp_path, *more))


def planned(tmp_path, *more):
    """The config of a run of the tiny model, as `config_of` changes it, and the model that learns."""
    from omegaconf import OmegaConf

    from ldm.train import dreambooth, run
    from ldm.train.options import dreambooth_parser, parse

    given = main.parser().parse_args(arguments(tmp_path, *more))
    OmegaConf.save(OmegaConf.create(lora_pti.config_of(given)), tmp_path / "pti.yaml")
    words = ["--base", given.config, tmp_path / "pti.yaml", "--data_root", given.instance_data_dir]
    plan = dreambooth.plan(*parse(dreambooth_parser(""), [str(word) for word in words]))
    return plan.config, run.base_model(plan)


@pytest.mark.parametrize(
    ("more", "captions"),
    [
        ([], ["photo of a <s1>"]),
        (["--class_word", "woman"], ["photo of a <s1> woman"]),
        (["--use_template", "object"], ["<s1>", "a close-up of <s1>", "a photo of <s1>", "a picture of <s1>"]),
    ],
)
def test_captions_name_a_class_only_where_one_is_given(tmp_path, more, captions):
    config, _ = planned(tmp_path, "--placeholder_tokens", "<s1>", *more)
    assert instantiate_from_config(config.data.params.train).all_captions() == captions


def test_rates_can_be_scaled_by_the_pictures_of_a_step(tmp_path):
    more = ["--placeholder_tokens", "<s1>", "--train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    _, plain = planned(tmp_path, *more)
    _, scaled = planned(tmp_path, *more, "--scale_lr")
    rates, larger = ([chosen.learning_rate for chosen in model.tuning.families] for model in (plain, scaled))
    assert rates == [5e-4, 1e-4, 1e-5] and larger == pytest.approx([8 * rate for rate in rates])


def test_without_inversion_words_stay_at_their_start(tmp_path):
    more = ["--placeholder_tokens", "<s1>", "--initializer_tokens", "dog", "--perform_inversion", "False"]
    main(arguments(tmp_path, *more, "--learning_rate_unet", "0.01"))
    content = cloneofsimo.read_safetensors(tmp_path / "out/final_lora.safetensors")
    from ldm.tuning.textual_inversion import released_table, word_ids
    from tests.runs import tiny_model

    encoder = tiny_model("model.params.unet_config.params.adapter_config=null").cond_stage_model
    start = released_table(encoder)[word_ids(encoder, "dog")]
    assert torch.allclose(content.tokens["<s1>"].flatten(), start.flatten(), atol=1e-3)  # kept as fp16
    found = cloneofsimo.to_lora(content, skeleton(tmp_path / "tiny.yaml"), "final")
    assert any(delta(factors).abs().max() > 0 for factors in found.layers.values())


def test_words_and_loras_have_rates_schedules_and_decays_of_their_own(tmp_path):
    """The published command: words go on at a rate of their own in the second stage, and do not decay."""
    more = ["--placeholder_tokens", "<s1>|<s2>", "--continue_inversion", "--continue_inversion_lr=1e-4"]
    more += ["--weight_decay_ti=0.000", "--weight_decay_lora=0.001", "--lr_scheduler=constant", "--color_jitter"]
    more += ["--lr_scheduler_lora=cosine", "--lr_warmup_steps_lora=1"]
    _, model = planned(tmp_path, *more)
    model.learning_rate = 1e-4  # which the run sets
    (optimizer,), (schedule,) = model.configure_optimizers()
    found = []
    for _ in range(7):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule["scheduler"].step()
    by_rate = {group["initial_lr"]: group["weight_decay"] for group in optimizer.param_groups}
    assert by_rate == {5e-4: 0.0, 1e-4: 1e-3, 1e-5: 1e-3}
    words = [rates[[group["initial_lr"] for group in optimizer.param_groups].index(5e-4)] for rates in found]
    loras = [rates[[group["initial_lr"] for group in optimizer.param_groups].index(1e-4)] for rates in found]
    factors = [1, 1, 1, 0, 1, 0.5, 0]  # constant; a step of warm-up, half a cosine of two steps
    assert loras == pytest.approx([1e-4 * factor for factor in factors])
    assert words == pytest.approx([rate * f for rate, f in zip([5e-4] * 3 + [1e-4] * 4, factors, strict=True)])


@pytest.mark.parametrize(
    ("device", "options"),
    [
        ("cuda:1", ["--gpus", "1,"]),
        ("cuda", ["--accelerator", "gpu"]),
        ("cpu", ["--accelerator", "cpu"]),
        ("auto", ["--accelerator", "auto"]),
    ],
)
def test_the_index_of_a_device_counts(device, options):
    assert lora_pti.device_options(device) == options


def test_the_published_arguments(golden):
    ours = {action.dest: action for action in main.parser()._actions}
    published = json.loads((golden / "manifests/published_cli.json").read_text())[
        "lora/lora_diffusion/cli_lora_pti.py:train"
    ]
    for argument in published:
        action = ours[argument["name"]]
        assert action.required == argument["required"]
        other = ("device", "resolution", "gradient_accumulation_steps", *lora_pti.FIXED, *lora_pti.IGNORED)
        if not argument["required"] and argument["name"] not in other:
            assert action.default == argument["default"], argument["name"]


def with_masks(tmp_path, names):
    photos = pictures(tmp_path / "photos", 2)
    for number, path in enumerate(sorted(photos.iterdir())):
        picture = Image.open(path)
        path.unlink()
        picture.save(photos / names[0].format(number))
        mask = Image.new("L", picture.size, 0)
        mask.paste(255, (0, 0, picture.width // 2, picture.height))
        mask.save(photos / f"{number}.mask.png")
    return photos


def test_masks_and_captions_of_the_published_layout(tmp_path):
    """--use_mask_captioned_data --placeholder_token_at_data="<krk>|<s1><s2>", on what lora_ppim writes."""
    photos = with_masks(tmp_path, ["{}.src.jpg"])
    (photos / "caption.txt").write_text("<krk> on a beach\na photo of <krk>\n")
    more = ["--placeholder_tokens", "<s1>|<s2>", "--placeholder_token_at_data", "<krk>|<s1><s2>"]
    given = main.parser().parse_args(arguments(tmp_path, *more, "--use_mask_captioned_data", "--mask_temperature=0.5"))
    folder = lora_pti.pictures(given)
    params = lora_pti.config_of(given)["data"]["params"]["train"]
    shown = instantiate_from_config({**params, "params": {**params["params"], "data_root": folder, "size": 32}})
    items = [shown.sample(k) for k in range(2)]
    assert {item["caption"] for item in items} == {"<s1><s2> on a beach", "a photo of <s1><s2>"}
    for item in items:
        low, high = item["loss_mask"].min(), item["loss_mask"].max()
        assert low == pytest.approx(0.01 / 1.01, rel=1e-3) and high == 1
    (photos / "1.mask.png").unlink()
    with pytest.raises(InputError, match="1.src.jpg has no mask 1.mask.png"):
        lora_pti.pictures(given)


def test_masks_of_faces_weigh_the_loss(tmp_path):
    with_masks(tmp_path, ["{}.png"])
    words = arguments(tmp_path, "--placeholder_tokens", "<s1>", "--use_face_segmentation_condition")
    for path in (tmp_path / "photos").glob("[01].png"):
        assert (tmp_path / "photos" / f"{path.stem}.mask.png").is_file()
    main(words)
    (run,) = (tmp_path / "out").glob("*_pti")
    assert (tmp_path / "out/final_lora.safetensors").is_file()
    from ldm.config import load_config

    train = load_config(run / "configs/project.yaml").data.params.train
    assert train.target.endswith("CaptionedFolder") and train.params.masks.rest == pytest.approx((0.01 / 1.01) ** 2)


def test_training_of_an_inpainting_model(tmp_path):
    """--train_inpainting: nine input channels, random masks, and a LoRA that fits the plain model's layers."""
    words = arguments(tmp_path, "--placeholder_tokens", "<s1>", "--train_inpainting", "--learning_rate_unet", "0.01")
    from omegaconf import OmegaConf

    from ldm.checkpoints import save_safetensors
    from ldm.config import load_config
    from ldm.models.building import build_model

    given = main.parser().parse_args(words)
    changed = OmegaConf.merge(load_config(given.config), lora_pti.config_of(given))
    base = build_model(changed, None, 0, tuned=False).state_dict()
    save_safetensors(tmp_path / "base.safetensors", {n: v for n, v in base.items() if "lora_" not in n})
    main(words)
    content = cloneofsimo.read_safetensors(tmp_path / "out/final_lora.safetensors")
    found = cloneofsimo.to_lora(content, skeleton(tmp_path / "tiny.yaml"), "final")
    assert any(delta(factors).abs().max() > 0 for factors in found.layers.values())
    with pytest.raises(InputError, match="leave masks of the photographs out"):
        main([*words, "--use_face_segmentation_condition", "--force"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--use_8bit_adam"], "--use_8bit_adam True has no counterpart here"),
        (["--placeholder_tokens", "<a>|<b>", "--initializer_tokens", "cat"], "1 --initializer_tokens for 2"),
        (["--placeholder_tokens", "<a>", "--initializer_tokens", "<zero>"], "no norm to keep"),
        (["--placeholder_tokens", "<a>", "--initializer_tokens", "<rand>"], "expected <rand-0.017>"),
        (["--nonsense", "1"], "nonsense"),
        (["--device", "cuda:7"], "--gpus 7,: this machine has"),
    ],
)
def test_refusals(tmp_path, more, message):
    with pytest.raises(InputError, match=message):
        main(arguments(tmp_path, *more))
