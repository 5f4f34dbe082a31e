"""Training and sampling from end to end, through the two programs as a user calls them."""

import json
import re

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.checkpoints import save_torch
from ldm.config import load_config, parse_overrides
from ldm.errors import InputError
from tests.conftest import ROOT
from tests.runs import (
    TINY,
    arguments,
    events,
    find_run,
    last,
    main_dream_booth,
    pictures,
    resume,
    tiny_model,
    train,
)

pytestmark = pytest.mark.slow

PUBLISHED = ROOT / "tests" / "configs" / "published-attn2o-ffni.yaml"
NARROW = [  # a published config at the size of the tiny one
    "model.params.unet_config.params.model_channels=32",
    "model.params.unet_config.params.channel_mult=[1,2]",
    "model.params.unet_config.params.attention_resolutions=[1]",
    "model.params.unet_config.params.num_res_blocks=1",
    "model.params.unet_config.params.num_heads=2",
    "model.params.unet_config.params.context_dim=128",
    "model.params.image_size=8",
    "model.params.first_stage_config.params.ddconfig={ch: 32, ch_mult: [1, 1, 1], num_res_blocks: 1, resolution: 32}",
    "model.params.cond_stage_config.params={version: models/sd-mini/clip, max_length: 32}",
    "data.params.num_workers=0",
    "checkpoint.random_seed=0",
    *(f"data.params.{name}.params.size=32" for name in ("train", "reg", "validation")),
    "lightning.callbacks.image_logger.params={batch_frequency: 1000, steps: 2}",
]


def test_the_folder_of_a_run(trained):
    run = trained.run
    assert run.name.startswith("photos20") and run.name.endswith("_run")
    assert {path.name for path in run.iterdir()} == {".lock", "configs", "checkpoints", "images", "tensorboard"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"12-adapters", "24-adapters", "last.ckpt"}
    assert {path.name for path in trained.adapters.iterdir()} == {"adapters.safetensors", "adapter_config.json"}
    config = load_config(run / "configs" / "project.yaml")
    assert config.lightning.trainer.max_steps == 24 and config.dreambooth.class_word == "dog"


def test_the_last_checkpoint_holds_what_learns_and_nothing_else(trained):
    content = last(trained.run)
    adapters = load_file(trained.adapters / "adapters.safetensors")
    prefix = "model.diffusion_model."
    assert {name.removeprefix(prefix) for name in content["state_dict"]} == set(adapters)
    assert all(torch.equal(content["state_dict"][prefix + name], value) for name, value in adapters.items())
    weights = sum(value.numel() * 4 for value in adapters.values())
    assert (trained.run / "checkpoints" / "last.ckpt").stat().st_size < 3 * weights + 50_000  # AdamW keeps two more


def test_what_the_adapter_folder_says_about_itself(trained):
    about = json.loads((trained.adapters / "adapter_config.json").read_text())
    (entry,) = about["adapters"]
    assert (entry["din"], entry["dout"], entry["mid_dim"], entry["scale"]) == ("attn2o", "ffni", 24, 1.0)
    assert (about["step"], about["class_word"], about["identifier"]) == (24, "dog", "sks")
    assert len(about["base_fingerprint"]) == 16 and about["versions"]["torch"] == torch.__version__


def test_curves_and_samples_are_in_tensorboard_and_in_the_folder(trained):
    found = events(trained.run)
    assert len(found.Scalars("train/loss_simple")) == len(found.Scalars("train/loss_prior")) == 24
    assert {"val/loss_simple", "lr-AdamW", "train/grad_norm", "memory/peak_gib"} <= set(found.Tags()["scalars"])
    of_step = {event.step: event.value for event in found.Scalars("train/loss_with_prior")}
    prior = {event.step: event.value for event in found.Scalars("train/loss_prior")}
    for event in found.Scalars("train/loss_simple"):
        assert of_step[event.step] == pytest.approx(event.value + prior[event.step], rel=1e-5)
    assert all(event.value > 0 for event in found.Scalars("train/grad_norm"))
    assert [image.step for image in found.Images("samples")] == [24]
    with Image.open(trained.run / "images" / "000024.png") as grid:
        width, line = 4 * (96 + 6) + 6, 15 + 2 * 6  # four pictures a row, enlarged to 96 pixels, below its caption
        assert grid.size == (width, 2 * (line + 96 + 6))
        assert grid.text["prompt"] == "photo of a sks dog | photo of a dog"


def test_the_loss_falls(trained):
    """On pictures and draws that are the same after every epoch."""
    losses = [scalar.value for scalar in events(trained.run).Scalars("val/loss_simple")]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[-1] < 0.985 * losses[0]


def test_adapters_change_and_the_base_does_not(tmp_path, trained):
    from ldm.train import dreambooth
    from ldm.train import run as runs
    from ldm.train.options import dreambooth_parser, parse

    argv = arguments(tmp_path, "-n", "run", "--accelerator", "cpu")
    plan = dreambooth.plan(*parse(dreambooth_parser(""), argv))
    model = runs.base_model(plan)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    runs.train(plan, model)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(model.trainable_parameters()) and changed


def test_several_configs_later_ones_win(tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text("lightning: {trainer: {max_steps: 2}}\nmodel: {base_learning_rate: 0.5}\n")
    run = train(tmp_path, "run", "-b", more, "model.params.reg_weight=0.5")
    config = load_config(run / "configs" / "project.yaml")
    assert last(run)["global_step"] == 2
    assert (config.model.base_learning_rate, config.model.params.reg_weight) == (0.5, 0.5)


def test_a_time_is_no_number_of_base_60():
    from ldm.train.options import dreambooth_parser, parse

    words = ["--max_time", "00:12:00:00", "lightning.trainer.max_time=1:02:03:04", "model.params.reg_weight=0.5"]
    _, options, overrides = parse(dreambooth_parser(""), words)
    assert options["max_time"] == "00:12:00:00"
    assert OmegaConf.to_container(parse_overrides(overrides)) == {
        "lightning": {"trainer": {"max_time": "1:02:03:04"}}, "model": {"params": {"reg_weight": 0.5}},
    }  # fmt: skip


def test_a_run_begun_from_the_config_of_another_keeps_its_words_unless_told_otherwise(tmp_path, trained):
    told = trained.run / "configs" / "project.yaml"
    words = ["-b", told, "-t", "--logdir", tmp_path / "logs", "--max_steps", 1]
    main_dream_booth(*words, "-n", "kept")
    main_dream_booth(*words, "-n", "changed", "--class_word", "cat", "-s", 5)
    for name, expected in (("kept", ("dog", 23)), ("changed", ("cat", 5))):
        config = load_config(find_run(tmp_path, name) / "configs" / "project.yaml")
        assert (config.dreambooth.class_word, config.dreambooth.seed) == expected
        assert config.data.params.train.params.class_word == expected[0]


def test_other_files_are_skipped_with_one_warning(tmp_path, caplog):
    pictures(tmp_path / "photos", 2), pictures(tmp_path / "class", 2)
    (tmp_path / "photos" / "notes.md").write_text("mine")
    (tmp_path / "photos" / "notes.txt").write_text("mine")
    with caplog.at_level("WARNING"):
        train(tmp_path, "run", "--max_steps", 1)
    assert caplog.text.count("photos: skipped 1 that are not pictures: notes.md") == 1
    assert caplog.text.count("photos: 1 captions without a picture: notes.txt") == 1


@pytest.mark.parametrize("scale,rate", [("True", 0.001 * 2 * 3), ("false", 0.001)])
def test_scale_lr(tmp_path, scale, rate):
    more = ["--accumulate_grad_batches", 3, "data.params.batch_size=2", "--max_steps", 1]
    run = train(tmp_path, "run", "--scale_lr", scale, *more)
    assert last(run)["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(rate)


def test_the_whole_unet_learns(tmp_path):
    more = ["model.params.train_level=[unet]", "model.params.unet_config.params.adapter_config=null"]
    run = train(tmp_path, "run", *more, "--max_steps", 24, "model.base_learning_rate=3e-3")
    names = set(last(run)["state_dict"])
    assert names == {name for name, _ in tiny_model(*more).named_parameters() if name.startswith("model.")}
    first, *_, latest = (scalar.value for scalar in events(run).Scalars("val/loss_simple"))
    assert latest < 0.8 * first


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    logs = tmp_path / "logs"
    monkeypatch.setattr("ldm.train.run_folder.new_folder", lambda *_: logs / "same")  # as if in the same second
    for _ in range(2):
        main_dream_booth(*arguments(tmp_path, "--accelerator", "cpu", "--max_steps", 1))
    assert {path.parents[1] for path in logs.glob("*/checkpoints/last.ckpt")} == {logs / "same", logs / "same-1"}


def test_sections_of_lightning_may_be_empty(tmp_path):
    empty = [f"lightning.{name}=null" for name in ("trainer", "callbacks", "modelcheckpoint")]
    assert last(train(tmp_path, "run", "--max_steps", 1, *empty))["global_step"] == 1


def test_losses_are_told_whole_however_many_batches_make_a_step(tmp_path, caplog):
    told = {}
    for count in (1, 3):
        caplog.clear()
        with caplog.at_level("INFO", "ldm"):
            train(tmp_path, f"run{count}", "--accumulate_grad_batches", count, "--max_epochs", 1, "--max_steps", -1,
                  "model.base_learning_rate=1e-12", f"data.params.batch_size={3 // count}")  # fmt: skip
        told[count] = re.search(r"epoch 0: loss ([\d.]+)", caplog.text)[1]
    assert told[1] == told[3]


def test_without_class_pictures(tmp_path):
    run = train(tmp_path, "run", "data.params.reg=null", "lightning.callbacks.image_logger=null", "--max_steps", 1)
    assert "train/loss_prior" not in events(run).Tags()["scalars"]


def test_without_t_it_only_reports(tmp_path, capsys):
    main_dream_booth(*(word for word in arguments(tmp_path) if word != "-t"))
    assert "16 tensors" in (out := capsys.readouterr().out) and "nothing trained: add -t" in out
    assert not (tmp_path / "logs").exists()


def test_the_published_config_runs_unchanged(tmp_path):
    published = PUBLISHED.read_text()
    assert len(published.splitlines()) > 100 and "UNetModel_inject" in published and "defaults" not in published
    run = train(tmp_path, "run", "--max_steps", 2, "--scale_lr", "False", *NARROW, config=PUBLISHED)
    assert (run / "checkpoints" / "2-adapters").is_dir()


def test_class_pictures_are_made_once_and_only_as_many_as_lack(tmp_path, monkeypatch):
    from ldm import generate

    made, real = [], generate.generate
    quick = generate.Settings(steps=1)
    monkeypatch.setattr(generate, "generate", lambda m, p, seeds, s, *a: made.extend(seeds) or real(m, p, seeds, quick))
    photos, reg = pictures(tmp_path / "photos", 2), tmp_path / "class"
    pictures(reg, 1)
    words = ["--base", TINY, "-t", "--data_root", photos, "--reg_data_root", reg, "--logdir", tmp_path / "logs"]
    words += ["--accelerator", "cpu", "--max_steps", 1, "--num_class_images", 6, "--class_word", "cat"]
    main_dream_booth(*words, "-n", "first")
    assert len(made) == 5 and len(list(reg.glob("*.png"))) == 6
    with Image.open(reg / "00003.png") as picture:
        assert picture.text == {"prompt": "photo of a cat", "seed": str(23 + 3)}
        kept = picture.tobytes()
    (reg / "00003.png").unlink()  # as if interrupted
    main_dream_booth(*words, "-n", "second")
    assert len(made) == 6 and len(list(reg.glob("*.png"))) == 6
    main_dream_booth(*words, "-n", "third")
    assert len(made) == 6 and kept
    told = {tag for name in ("first", "third") for tag in events(find_run(tmp_path, name)).Tags()["scalars"]}
    assert "train/loss" in told and "val/loss_simple" not in told  # drawing them left the model in training mode


def base_files(folder) -> None:
    """One set of weights, as the files that people have."""
    weights = tiny_model().state_dict()
    weights = {name: value for name, value in weights.items() if "adapter" not in name}
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
    averages = {
        "model_ema." + n.removeprefix("model.").replace(".", ""): torch.zeros(1)
        for n in weights
        if n.startswith("model.")
    }
    save_torch(folder / "level.ckpt", {"state_dict": weights, "epoch": 3, "global_step": 70})
    save_torch(folder / "flat.ckpt", weights)
    save_torch(folder / "half.ckpt", {"state_dict": half})
    save_torch(folder / "averages.ckpt", {"state_dict": weights | averages | {"model_ema.decay": torch.tensor(0.9)}})
    save_file({name: value.clone() for name, value in weights.items()}, folder / "plain.safetensors")


def test_base_models_in_every_kind_of_file(tmp_path):
    base_files(tmp_path)
    runs = {}
    for path in [*tmp_path.glob("*.ckpt"), *tmp_path.glob("*.safetensors")]:
        run = train(tmp_path, path.stem, "--actual_resume", path, "--max_steps", 1)
        runs[path.stem] = last(run)["state_dict"]
    assert set(runs) == {"level", "flat", "half", "averages", "plain"}
    first = runs.pop("level")
    for kind, state in runs.items():
        for name, value in state.items():
            assert (value - first[name]).abs().mean() <= (1e-4 if kind == "half" else 0), f"{kind}: {name}"


def test_learnt_words_are_added_before_training(tmp_path, caplog):
    words = tmp_path / "words.pt"
    torch.save({"<toy>": torch.randn(128)}, words)
    with caplog.at_level("INFO"):
        run = train(tmp_path, "run", "--embedding_manager_ckpt", words, "--init_word", "toy", "--max_steps", 1)
        assert "learnt words <toy> added" in caplog.text and "--init_word toy has no effect" in caplog.text
        caplog.clear()
        resume(run, "--max_steps", 2)
    assert "learnt words <toy> added" in caplog.text


def test_real_photographs(tmp_path, shared):
    roots = ["--class_word", "dog", "--data_root", shared / "data/dreambench/dog"]
    roots += ["--reg_data_root", shared / "data/class_images/dog"]
    main_dream_booth(
        "--base",
        TINY,
        "-t",
        *roots,
        "--logdir",
        tmp_path / "logs",
        "-n",
        "dog",
        "--max_steps",
        2,
        "--accelerator",
        "cpu",
    )
    assert find_run(tmp_path, "dog").name.startswith("dog20")


def test_what_the_class_pictures_show_is_never_guessed(tmp_path):
    words = arguments(tmp_path, "-n", "run")
    at = words.index("--class_word")
    with pytest.raises(InputError, match="what is on the class pictures. name it with --class_word"):
        main_dream_booth(*words[:at], *words[at + 2 :])
    assert not (tmp_path / "logs").exists()


def test_two_configs_with_adapters_say_which_win(tmp_path, caplog):
    folder = ROOT / "configs/sd-mini"
    words = arguments(tmp_path, config=folder / "attn2o-ffni.yaml")
    words.remove("-t")
    with caplog.at_level("WARNING"):
        main_dream_booth(*words, "--base", folder / "attn2o-ffni.yaml", folder / "ffni-ffni.yaml")
    assert f"transformer_adp_config: the adapters of {folder / 'ffni-ffni.yaml'} replace those" in caplog.text
    caplog.clear()
    main_dream_booth(*words, "--base", folder / "attn2o-ffni.yaml", folder / "resi-resi.yaml")
    assert f"those of the first config stay beside those of {folder / 'resi-resi.yaml'}" in caplog.text
