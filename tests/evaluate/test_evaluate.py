"""`ldm evaluate` of a run with its checkpoints, of what was tuned, of pictures; `ldm train --evaluate`."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.checkpoints import save_safetensors
from ldm.commands import Program
from ldm.errors import InputError
from ldm.evaluate.metrics import cosines
from ldm.evaluate.networks import load_network
from ldm.evaluate.sources import is_pictures
from tests.conftest import ROOT
from tests.runs import TINY, arguments, events, find_run, main_dream_booth, pictures, train

MINI = "models/sd-mini/clip"
QUICK = [
    "--network",
    MINI,
    "--protocol",
    "fast",
    "--first",
    "2",
    "--n_samples",
    "2",
    "--class_samples",
    "2",
    "--ddim_steps",
    "2",
    "--cache",
    "off",
    "--device",
    "cpu",
]


def evaluate(*words: object) -> None:
    Program("evaluate")([str(word) for word in words])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six steps with checkpoints at 3 and 6, whose adapters have moved."""
    work = tmp_path_factory.mktemp("run")
    more = [
        "--max_steps",
        "6",
        "lightning.modelcheckpoint.params.every_n_train_steps=3",
        "model.base_learning_rate=0.02",
    ]
    return train(work, "scored", "--no-test", *more)


@pytest.mark.slow
def test_every_checkpoint_of_a_run(run, tmp_path, capsys):
    outs = [tmp_path / name for name in ("scores.json", "scores.csv", "similar.npy")]
    evaluate(
        run,
        *QUICK,
        "--checkpoints",
        "all",
        *(word for out in outs for word in ("--out", out)),
        "--pictures",
        tmp_path / "kept",
    )
    scores = json.loads(outs[0].read_text())
    assert [one["step"] for one in scores] == [3, 6] and {one["class_word"] for one in scores} == {"dog"}
    assert scores[0]["pictures"][0]["prompt"] == "a sks dog in the jungle" and len(scores[0]["pictures"]) == 4
    first, second = (one["scores"] for one in scores)
    assert first["clip_base_alike"] == second["clip_base_alike"]  # of one base, which the first checkpoint left alone
    assert first["clip_prior_same"]["mean"] < 1 and first["clip_i"] != second["clip_i"]
    with outs[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["clip_i"]) for row in rows] == [one["clip_i"]["mean"] for one in (first, second)]
    assert {"step", "clip_i_low", "clip_t_high", "clip_prior_shift", "clip_network"} <= rows[0].keys()
    similar = np.load(outs[2], allow_pickle=False)
    assert similar.dtype == np.float32 and similar.tolist() == pytest.approx(
        [one["clip_i"]["mean"] for one in (first, second)]
    )
    printed = capsys.readouterr().out
    assert "clip_i" in printed and "in brackets 95 % intervals" in printed and str(outs[0]) in printed
    kept = sorted((tmp_path / "kept" / "6").glob("*.png"))
    assert len(kept) == 4 and Image.open(kept[0]).text["prompt"] == "a sks dog in the jungle"

    again = tmp_path / "again.json"
    evaluate(
        kept[0].parent,
        "--network",
        MINI,
        "--cache",
        "off",
        "--data_root",
        run.parents[1] / "photos",
        "--class_word",
        "dog",
        "--out",
        again,
    )
    (of_pictures,) = json.loads(again.read_text())
    for name in ("clip_i", "clip_t", "clip_diversity"):
        assert of_pictures["scores"][name] == pytest.approx(second[name])


@pytest.mark.slow
def test_a_folder_of_adapters_knows_its_run_or_is_given_a_base(run, tmp_path):
    inside, outside = tmp_path / "inside.json", tmp_path / "outside.json"
    adapters = run / "checkpoints" / "6-adapters"
    evaluate(adapters, *QUICK, "--out", inside)
    shutil.copytree(adapters, tmp_path / "6-adapters")
    given = ["--config", TINY, "--data_root", run.parents[1] / "photos", "--class_word", "dog"]
    evaluate(tmp_path / "6-adapters", *QUICK, *given, "--out", outside)
    (one,), (two,) = (json.loads(file.read_text()) for file in (inside, outside))
    assert one["scores"] == two["scores"] and one["step"] == two["step"] == 6


@pytest.mark.slow
def test_a_lora_file_on_a_base(tmp_path):
    """A LoRA in a file of another program is scored as the folder that it was made from."""
    from ldm.config import load_config
    from ldm.interchange import Context, by_name, own
    from ldm.models.building import build_model
    from ldm.tuning import files
    from tests.tuned_models import shake

    no_adapters = ["model.params.unet_config.params.adapter_config=null", "model.params.train_level=[]"]
    lora = "[{family: lora, params: {targets: {'model.diffusion_model.*.to_q': {rank: 2}}}}]"
    model = shake(build_model(load_config(TINY, [f"model.params.tuning={lora}", *no_adapters]), None, 0), size=1)
    files.save(model, tmp_path / "7-adapters")
    by_name("kohya").write(tmp_path / "a.safetensors", own.lora(tmp_path / "7-adapters"), Context(model))
    given = ["--config", TINY, "--data_root", pictures(tmp_path / "photos", 2), "--class_word", "dog"]
    scores = []
    for name in ("7-adapters", "a.safetensors"):
        evaluate(tmp_path / name, *QUICK, *given, "--out", tmp_path / f"{name}.json")
        scores += json.loads((tmp_path / f"{name}.json").read_text())
    folder, file = ({name: value["mean"] for name, value in one["scores"].items()} for one in scores)
    assert file == pytest.approx(folder, abs=1e-3) and folder["clip_prior_same"] < 0.9999


@pytest.mark.slow
def test_a_training_scores_itself_at_the_end(tmp_path, monkeypatch, capsys):
    from ldm.commands import train as command
    from ldm.evaluate.protocol import Protocol

    quick = Protocol(first=1, per_prompt=2, per_class=2, steps=2, sampler="dpm_solver", networks=(MINI,))
    monkeypatch.setitem(command.PROTOCOLS, "fast", quick)
    main_dream_booth(
        *arguments(
            tmp_path, "-n", "scored", "--accelerator", "cpu", "--max_steps", "2", "--no-test", "--evaluate", "fast"
        )
    )
    run = find_run(tmp_path, "scored")
    (scores,) = json.loads((run / "scores.json").read_text())
    logged = events(run).Scalars("score/clip_i")
    assert [(one.step, one.value) for one in logged] == [
        (2, pytest.approx(scores["scores"]["clip_i"]["mean"], abs=1e-6))
    ]
    assert "clip_i" in capsys.readouterr().out


def test_networks_that_are_absent_are_told_before_a_training(tmp_path, monkeypatch):
    from ldm.evaluate import networks

    monkeypatch.setattr(networks, "DEFAULTS", {None: ("nobody/nothing",)})
    with pytest.raises(InputError, match="no network nobody/nothing"):
        main_dream_booth(*arguments(tmp_path, "--accelerator", "cpu", "--evaluate"))
    assert not (tmp_path / "logs").exists()


def test_pictures_alone(tmp_path):
    """Without photographs and prompts there are diversity, FID and KID; the rest is left out, and said."""
    ours, theirs = pictures(tmp_path / "ours", 5), pictures(tmp_path / "theirs", 6, seed=1)
    evaluate(ours, "--network", MINI, "--cache", tmp_path / "cache", "--against", theirs, "--out", tmp_path / "a.json")
    (found,) = json.loads((tmp_path / "a.json").read_text())
    assert set(found["scores"]) == {"clip_diversity"} and set(found["distances"]) == {
        "clip_fid",
        "clip_kid",
        "clip_kid_std",
    }
    assert found["distances"]["clip_fid"] > 0
    assert "clip_t: 5 of 5 pictures do not say their prompt" in found["notes"]
    network = load_network(MINI)
    vectors = network.vectors([Image.open(path).convert("RGB") for path in sorted(ours.glob("*.png"))])
    expected = 1 - (cosines(vectors, vectors).sum() - 5) / 20
    assert found["scores"]["clip_diversity"]["mean"] == pytest.approx(expected.item(), abs=1e-5)
    assert (tmp_path / "cache" / "features.sqlite").is_file()


def test_what_is_a_folder_of_pictures(tmp_path):
    assert is_pictures(pictures(tmp_path / "a", 1)) and not is_pictures(tmp_path / "a" / "0.png")
    save_safetensors(tmp_path / "b" / "adapters.safetensors", {"a": torch.zeros(1)})
    assert not is_pictures(tmp_path / "b")


def refused(message: str, *words: object) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(*words)


def test_bad_input_is_one_line(tmp_path):
    pictures(tmp_path / "a", 2)
    adapters = ROOT / "tests/recorded/files/attn2o-ffni"
    refused("nowhere does not exist: expected a run", tmp_path / "nowhere")
    refused("--out x.txt: expected a name that ends in .json, .csv, .npy", tmp_path / "a", "--out", "x.txt")
    refused("--checkpoints is for runs", tmp_path / "a", "--checkpoints", "all")
    refused("--data_root is missing", adapters, "--config", TINY)
    refused("--class_word is missing", adapters, "--config", TINY, "--data_root", tmp_path / "a")
    refused(
        "FID and KID need at least 4 pictures",
        tmp_path / "a",
        "--network",
        MINI,
        "--cache",
        "off",
        "--against",
        tmp_path / "a",
    )
    refused(
        "similar.npy: .* has no clip_i",
        tmp_path / "a",
        "--network",
        MINI,
        "--cache",
        "off",
        "--out",
        tmp_path / "similar.npy",
    )
    assert not (tmp_path / "similar.npy").exists()
    refused("--prompts none.txt is no file", adapters, "--config", TINY, "--data_root", tmp_path / "a", "--class_word",
            "dog", "--prompts", "none.txt")  # fmt: skip
    refused("is the weights of a whole model: give it with --ckpt", ROOT / "models/sd-mini/model.safetensors")
    refused("expected a finite number, got 'nan'", tmp_path / "a", "--scale", "nan")
    refused("expected a whole number of at least 1, got '-1'", tmp_path / "a", "--class_samples", "-1")
    run = tmp_path / "run"
    (run / "configs").mkdir(parents=True)
    (run / "configs" / "project.yaml").write_text("model: {target: ldm.models.clip.CLIP}\ndata: {}\n")
    refused("is no run of ldm train", run)
    (run / "configs" / "project.yaml").write_text(
        "model: {target: ldm.models.diffusion.ddpm.LatentDiffusion}\n"
        "data: {target: ldm.train.datamodule.DataModuleFromConfig, params: {batch_size: 1, train: "
        "{target: ldm.data.dreambooth.PersonalizedBase}}}\ndreambooth: {class_word: dog}\n"
    )
    refused("has no <step>-adapters", run)
    (run / "one" / "configs").mkdir(parents=True)
    (run / "one" / "configs" / "project.yaml").touch()
    refused("holds 1 trainings; name one of them", run)
    (run / "checkpoints" / "5-adapters").mkdir(parents=True)
    refused("expected last, all, or some of the steps 5", run, "--checkpoints", "7")


@pytest.mark.slow
def test_each_concept_has_its_photographs_words_and_prompts(run, tmp_path):
    """Custom Diffusion's evaluation: a row for each concept of a list."""
    for number, name in enumerate(("dogs", "cats")):
        pictures(tmp_path / name, 2, seed=number)
    (tmp_path / "cats.txt").write_text("a {} in the snow\na red {}\n")
    concepts = [
        {"datapath": str(tmp_path / "dogs"), "caption": "<new1> dog", "reg_caption": "dog", "prompts": ["a {} at sea"]},
        {"instance_data_dir": str(tmp_path / "cats"), "instance_prompt": "photo of a <new2> cat",
         "class_prompt": "cat", "prompts": str(tmp_path / "cats.txt")},
    ]  # fmt: skip
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    evaluate(run, *QUICK, "--concepts_list", tmp_path / "concepts.json", "--out", tmp_path / "scores.json")
    dog, cat = json.loads((tmp_path / "scores.json").read_text())
    assert [one["class_word"] for one in (dog, cat)] == ["dog", "cat"]
    assert {one["prompt"] for one in dog["pictures"]} == {"a <new1> dog at sea"}
    assert {one["prompt"] for one in cat["pictures"]} == {"a <new2> cat in the snow", "a red <new2> cat"}
    assert {"clip_i", "clip_t"} <= dog["scores"].keys() and dog["scores"]["clip_i"] != cat["scores"]["clip_i"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reg_caption": None}, "concept 1: its class must be named"),
        ({"reg_caption": "cat"}, "concept 1: its class must be named .* got '<new1> dog' and 'cat'"),
        ({"prompts": "absent.txt"}, "--prompts absent.txt is no file"),
        ({"prompts": ["a dog"]}, "expected a template per line with {} once"),
    ],
)
def test_concepts_that_cannot_be_scored(tmp_path, change, message):
    entry = {"datapath": str(tmp_path), "caption": "<new1> dog", "reg_caption": "dog", **change}
    (tmp_path / "concepts.json").write_text(json.dumps([entry]))
    with pytest.raises(InputError, match=message):
        evaluate(tmp_path, "--concepts_list", tmp_path / "concepts.json")
    with pytest.raises(InputError, match="leave --data_root"):
        evaluate(tmp_path, "--concepts_list", tmp_path / "concepts.json", "--class_word", "dog")
