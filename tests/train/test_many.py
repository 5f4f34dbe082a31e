"""Trainings side by side over one base become what they become alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ldm.errors import InputError
from ldm.models.diffusion.training import DiffusionTraining
from tests.runs import TINY, differences, find_run, last, pictures, pixels, train

pytestmark = pytest.mark.slow

CPU = ["--accelerator", "cpu"]
QUIET = [*CPU, "lightning.callbacks.image_logger.params.disabled=true"]


def main(*words):
    from scripts.train_many import main

    main([str(word) for word in words])


@pytest.fixture
def work(tmp_path):
    for name, count, seed in (("photos", 4, 0), ("other", 3, 5), ("class", 3, 1)):
        pictures(tmp_path / name, count, seed)
    other = tmp_path / "wide.yaml"
    adapters = "[{din: attn1i, dout: transo, mid_dim: 5, scale: 0.5}, {din: attn2o, dout: ffni, mid_dim: 3}]"
    other.write_text(
        f"defaults: {TINY}\nmodel: {{base_learning_rate: 3.0e-3, params: {{unet_config: {{params: {{adapter_config: "
        f"{{transformer_adp_config: {adapters}, resblock_adp_config: {{din: resi, dout: reso, mid_dim: 2}}}}}}}}}}}}\n"
    )
    return tmp_path


def arguments(work, *more):
    return [
        "-t", "--base", TINY, work / "wide.yaml", "--data_root", work / "photos", work / "other", "--class_word", "dog",
        "--reg_data_root", work / "class", "--logdir", work / "logs", *QUIET, *more,
    ]  # fmt: skip


def test_each_becomes_what_it_becomes_alone(work):
    # Not AdamW: a bias that the next norm takes out has no gradient but rounding, of which AdamW makes a whole step.
    plain = "model.params.optimizer_config={target: torch.optim.SGD}"
    main(*arguments(work, "-n", "many", "--max_steps", 5, plain))
    folders = sorted(find_run(work, "many").glob("0*"))
    assert [f.name.split("_", 1)[1] for f in folders] == ["tiny_photos", "tiny_other", "wide_photos", "wide_other"]
    for folder in folders:
        config, subject = folder.name.split("_")[1:]
        path = {"tiny": TINY, "wide": work / "wide.yaml"}[config]
        more = ["--class_word", "dog", "--data_root", work / subject, "--reg_data_root", work / "class"]
        more += ["--max_steps", 5, *QUIET, plain]
        alone = train(work, f"alone-{config}-{subject}", *more, config=path)
        here, there = (f / "checkpoints" / "5-adapters" for f in (folder, alone))
        ours, theirs = (load_file(f / "adapters.safetensors") for f in (here, there))
        assert ours.keys() == theirs.keys()
        assert max(v.abs().max() for n, v in theirs.items() if ".adp.2." in n) > 3e-5  # they start at zero
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
        about, expected = (json.loads((f / "adapter_config.json").read_text()) for f in (here, there))
        assert about.pop("files").keys() == expected.pop("files").keys()  # digests tell roundings apart
        assert about == expected


FAMILIES = {
    "lora": "[{family: lora, params: {rank: 2}}, {family: lora, params: {rank: 2, kind: loha}, learning_rate: 2.0e-3}]",
    "text": "[{family: lora, params: {rank: 2, targets: [cond_stage_model.*.self_attn.*_proj]}}]",
    "words": "[{family: textual-inversion, params: {words: <sks>, init_word: dog}}]",
    "biases": "[{family: biases}]",
    "keys": "[{family: cross-attention, steps: [0, 2]}, {family: norms, steps: [2, null]}]",
}


def test_other_families_become_what_they_become_alone_and_resume(work):
    plain = "model.params.optimizer_config={target: torch.optim.SGD}"
    configs = [TINY]
    for name, tuning in FAMILIES.items():
        configs.append(work / f"{name}.yaml")
        unet = "unet_config: {params: {adapter_config: null}}"
        word = "data: {params: {train: {params: {identifier: <sks>}}}}\n" if name == "words" else ""
        model = f"model: {{params: {{train_level: [], {unet}, tuning: {tuning}}}}}\n"
        configs[-1].write_text(f"defaults: {TINY}\n{model}{word}")
    roots = ["--class_word", "dog", "--data_root", work / "photos", "--reg_data_root", work / "class", *QUIET, plain]
    main("-t", "-n", "many", "--logdir", work / "logs", "--base", *configs, *roots, "--max_steps", 2)
    main("-t", "-r", find_run(work, "many"), "--max_steps", 4)
    for folder, path in zip(sorted(find_run(work, "many").glob("0*")), configs, strict=True):
        alone = train(work, f"alone-{folder.name}", *roots, "--max_steps", 4, config=path)
        here, there = (f / "checkpoints" / "4-adapters" for f in (folder, alone))
        (file,) = [one.name for one in there.glob("*.safetensors")]
        ours, theirs = (load_file(f / file) for f in (here, there))
        assert ours.keys() == theirs.keys()
        wrong = {n: ((ours[n] - v).abs().max() / v.abs().max()).item() for n, v in theirs.items()}
        assert max(wrong.values()) < 1e-4, (folder.name, sorted(wrong.items(), key=lambda x: -x[1])[:5])
        about, expected = (json.loads((f / "adapter_config.json").read_text()) for f in (here, there))
        assert about["families" if "families" in about else "adapters"] == expected[
            "families" if "families" in expected else "adapters"
        ]


def test_they_resume_exactly(work):
    main(*arguments(work, "-n", "whole", "--max_steps", 4))
    main(*arguments(work, "-n", "parts", "--max_steps", 2))
    main("-t", "-r", find_run(work, "parts"), "--max_steps", 4)
    assert differences(last(find_run(work, "whole")), last(find_run(work, "parts"))) == []


def test_configs_as_they_are_train_too(work):
    """With the image logger, which draws with each training's own model, and with a schedule."""
    words = [word for word in arguments(work, "-n", "run", *CPU, "--max_steps", 2) if word not in QUIET[2:]]
    often = "lightning.callbacks.image_logger.params.batch_frequency=1"
    schedule = "ldm.lr_scheduler.LambdaLinearScheduler"
    warm = "{warm_up_steps: [10], cycle_lengths: [100], f_start: [0.0], f_max: [1.0], f_min: [1.0]}"
    main(*words, often, f"model.params.scheduler_config={{target: {schedule}, params: {warm}}}")
    state = last(find_run(work, "run"))
    folders = sorted(find_run(work, "run").glob("0*"))
    grids = [[pixels(folder / "images" / f"{step:06}.png") for step in (1, 2)] for folder in folders]
    assert state["global_step"] == 2 and len(folders) == 4
    assert all(not torch.equal(*pair) for pair in grids), "they draw with what they have learnt"
    assert not torch.equal(grids[0][1], grids[1][1])
    assert [group["lr"] for group in state["optimizer_states"][0]["param_groups"]] == pytest.approx(
        [0.2 * group["initial_lr"] for group in state["optimizer_states"][0]["param_groups"]]
    )


def test_what_a_resume_cannot_change_is_refused(work):
    main(*arguments(work, "-n", "run", "--max_steps", 1))
    with pytest.raises(InputError, match="goes on with trainings as they are stored; leave --seed, --cache out"):
        main("-t", "-r", find_run(work, "run"), "--seed", 5, "--cache", "off")
    with pytest.raises(InputError, match="leave --scale_lr, --keep_memory, --num_class_images, --class_scale out"):
        more = ["--scale_lr", "--num_class_images", 2, "--class_scale", 1, "--keep_memory", "false"]
        main("-t", "-r", find_run(work, "run"), *more)


def test_class_pictures_are_drawn_once_for_each_folder(work, monkeypatch):
    from ldm import generate

    made, real = [], generate.generate

    def quick(model, prompts, seeds, settings, *more):
        made.append((prompts[0], len(seeds), settings.scale))
        return real(model, prompts, seeds, generate.Settings(steps=1), *more)

    monkeypatch.setattr(generate, "generate", quick)
    subjects = ["--class_word", "dog", "cat", "--reg_data_root", work / "class", work / "cats"]
    main(*arguments(work, *subjects, "--num_class_images", 4, "--class_scale", 2, "--max_steps", 1))
    assert sorted(made) == [("photo of a cat", 4, 2.0), ("photo of a dog", 1, 2.0)]  # three dogs are there
    assert len(list((work / "class").iterdir())) == len(list((work / "cats").iterdir())) == 4
    with pytest.raises(InputError, match="would be filled with 'photo of a dog' and with 'photo of a cat'"):
        main(*arguments(work, "--class_word", "dog", "cat", "--num_class_images", 4))


@pytest.mark.parametrize(
    "more, message",
    [
        (["model.params.train_level=[unet]"], r"tiny_photos: 100 % of the UNet's own weights learn, so that"),
        (["model.params.use_ema=true"], "use_ema averages one whole model: train it alone"),
        (["--class_word", "dog", "cat", "cow"], "3 times --class_word for 2 times --data_root"),
        (["--embedding_manager_ckpt", "words.pt"], "unknown option --embedding_manager_ckpt"),
        (["--no-test"], "unknown option --no-test"),
        (["--datapath", "photos", "--caption", "a dog"], "are for Custom Diffusion; here --data_root names"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(work, more, message):
    with pytest.raises(InputError, match=message):
        main(*arguments(work, *more))


def test_each_is_clipped_by_its_own_norm(work):
    told = ["model.params.optimizer_config={target: torch.optim.SGD}", "--max_steps", 3, *QUIET]
    clipped = [*told, "--gradient_clip_val", 1e-4]
    main(*arguments(work, "-n", "many", *clipped))
    (folder,) = find_run(work, "many").glob("*_tiny_photos")
    roots = ["--class_word", "dog", "--data_root", work / "photos", "--reg_data_root", work / "class"]
    whole, alone = (train(work, name, *roots, *more, config=TINY) for name, more in (("w", told), ("a", clipped)))
    ours, theirs, free = (load_file(f / "checkpoints/3-adapters/adapters.safetensors") for f in (folder, alone, whole))
    assert max((theirs[name] - free[name]).abs().max() for name in theirs) > 1e-5, "nothing was clipped"
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-9) for name in theirs)


def test_every_training_draws_noise_of_its_own():
    together = DiffusionTraining()
    together.train_side_by_side([DiffusionTraining(), DiffusionTraining()], [5, 9])
    assert [one.streams[0] for one in together.trainings] == together.streams
    drawn = []
    for stream in together.streams:
        with stream.drawing_from(torch.device("cpu")):
            drawn.append(torch.rand(3))
    assert not torch.equal(*drawn)
    assert torch.equal(drawn[0], torch.rand(3, generator=torch.Generator().manual_seed(5)))


def test_different_ways_of_training_are_refused(work):
    other = work / "other.yaml"
    other.write_text(f"defaults: {TINY}\ndata: {{params: {{reg: null}}}}\nlightning: {{trainer: {{max_steps: 7}}}}\n")
    with pytest.raises(InputError, match="pictures and learning rates: class pictures, trainer"):
        main(*arguments(work), "--base", other)


def test_different_models_are_refused(work):
    other = work / "deeper.yaml"
    other.write_text(f"defaults: {TINY}\nmodel: {{params: {{unet_config: {{params: {{num_res_blocks: 2}}}}}}}}\n")
    with pytest.raises(InputError, match="differ in more than their tuning"):
        main(*arguments(work), "--base", other)
