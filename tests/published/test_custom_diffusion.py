"""The commands of Custom Diffusion's README, on a small model: training, sampling, deltas, compression, composition.

Each line is the published one; only the model, the number of steps and the folders are smaller, and no GPU is named.
"""

import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from ldm.checkpoints import save_torch
from ldm.commands import Program
from ldm.config import instantiate_from_config, load_config
from ldm.data.concepts import ConceptPictures
from ldm.errors import InputError
from ldm.interchange import custom_diffusion, own
from ldm.models.building import build_model
from tests import runs
from tests.conftest import ROOT
from tests.train.test_custom_diffusion import SMALL_RUN

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Photographs, class pictures, the small config and a checkpoint of its random base."""
    work = tmp_path_factory.mktemp("readme")
    for number, name in enumerate(("cat", "chair", "samples_cat")):
        runs.pictures(work / name, 3, seed=number)
    (work / "small.yaml").write_text(SMALL_RUN)
    config = load_config(ROOT / "configs/sd-mini/custom-diffusion-finetune.yaml")
    config.merge_with(load_config(work / "small.yaml"))
    save_torch(work / "sd-v1-4.ckpt", {"state_dict": build_model(config, None, 0).state_dict()})
    return work


def trained(work, name, words):
    base = f"--base {ROOT}/configs/sd-mini/custom-diffusion-addtoken.yaml {work}/small.yaml --logdir {work}/logs"
    runs.main_dream_booth(*shlex.split(f"{base} {words} --name {name} --accelerator cpu --max_steps 2"))
    return runs.find_run(work, name)


def test_the_readme_from_training_to_pictures(work, tmp_path):
    """python -u train.py --base configs/custom-diffusion/finetune_addtoken.yaml -t --gpus 0,1
    --resume-from-checkpoint-custom <ckpt> --caption "<new1> cat" --datapath data/cat
    --reg_datapath real_reg/samples_cat --reg_caption "cat" --modifier_token "<new1>" --name "cat-sdv4"; then
    sample.py, get_deltas.py and compress.py."""
    ckpt = f"--resume-from-checkpoint-custom {work}/sd-v1-4.ckpt"
    run = trained(
        work, "cat-sdv4",
        f'-t {ckpt} --caption "<new1> cat" --datapath {work}/cat --reg_datapath {work}/samples_cat --reg_caption "cat" '
        '--modifier_token "<new1>" --batch_size 1 --repeat 2',
    )  # fmt: skip
    config = load_config(run / "configs" / "project.yaml")
    assert config.data.params.batch_size == 1 and config.data.params.train[0].params.repeat == 2

    Program("deltas")(shlex.split(f"--path {run} --newtoken 1"))
    (delta,) = [path for path in run.rglob("delta*") if path.is_file()]
    config = f"--config {tmp_path}/config.yaml"
    (tmp_path / "config.yaml").write_text((run / "configs" / "project.yaml").read_text())
    Program("sample")(
        shlex.split(
            f'--prompt "<new1> cat playing with a ball" --delta_ckpt {delta} --ckpt {work}/sd-v1-4.ckpt {config} '
            f"--n_samples 1 --n_iter 1 --ddim_steps 2 --scale 6. --ddim_eta 1. --outdir {tmp_path}/out"
        )
    )
    assert list((tmp_path / "out" / "samples").glob("*.png"))
    Program("compress")(shlex.split(f"--delta_ckpt {delta} --ckpt {work}/sd-v1-4.ckpt"))
    assert [path for path in delta.parent.iterdir() if "compressed" in path.name]


STUB = """
import json, pathlib, sys
pathlib.Path("said.jsonl").open("a").write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "train":
    folder = pathlib.Path("logs") / ("2026_" + sys.argv[sys.argv.index("--name") + 1]) / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "delta_epoch=000004.ckpt").touch()
"""


@pytest.mark.parametrize(
    ("script", "given", "words"),
    [
        ("gen", ["cat", "data/cat", "gen_reg/samples_cat", "cat", "finetune_addtoken.yaml"], "<new1>"),
        ("real", ["cat", "data/cat", "real_reg/samples_cat", "cat", "finetune_addtoken.yaml"], "<new1>"),
        (
            "joint",
            ["wooden pot", "data/pot", "real_reg/pot", "cat", "data/cat", "real_reg/cat", "p+c", "finetune_joint.yaml"],
            "<new1>+<new2>",
        ),
    ],
)
def test_the_scripts_train_extract_and_draw(script, given, words, tmp_path):
    """bash scripts/finetune_gen.sh "cat" data/cat gen_reg/samples_cat cat finetune_addtoken.yaml <base>"""
    (tmp_path / "stub.py").write_text(STUB)
    environment = runs.ENVIRONMENT | {"LDM": f"{sys.executable} {tmp_path / 'stub.py'}", "INDEX": "shards"}
    command = ["bash", str(ROOT / f"scripts/finetune_{script}.sh"), *given, "sd-v1-4.ckpt"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    *real, train, deltas, sample = said
    assert len(real) == {"gen": 0, "real": 1, "joint": 2}[script]
    for words_of_search in real:
        search = Program("class-pictures").parser().parse_args(words_of_search[1:])
        assert search.index == ["shards"] and search.class_prompt in given
    trained = Program("train").parser().parse_args(train[1:])
    assert trained.modifier_token == words and len(trained.datapath) == len(words.split("+"))
    assert (ROOT / trained.base[0]).is_file() and trained.actual_resume == "sd-v1-4.ckpt"
    assert Program("deltas").parser().parse_args(deltas[1:]).newtoken == len(words.split("+"))
    drawn = Program("sample").parser().parse_args(sample[1:])
    assert drawn.adapter_path[0].endswith("delta_epoch=000004.ckpt") and "<new1>" in drawn.prompt[0]
    assert subprocess.run(command[:4], cwd=tmp_path, env=environment, capture_output=True).returncode == 2


def flags(work, out, *more):
    """The published flags of one concept, made small."""
    return [
        "--pretrained_model_name_or_path", str(work / "sd-v1-4.ckpt"), "--output_dir", str(out), "--resolution=32",
        "--config", str(work / "merged.yaml"), "--train_batch_size=1", "--learning_rate=1e-3", "--lr_warmup_steps=0",
        "--max_train_steps=2", "--scale_lr", "--hflip", "--device", "cpu", "--dataloader_num_workers=0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def merged(work):
    OmegaConf.save(
        OmegaConf.merge(
            load_config(ROOT / "configs/sd-mini/custom-diffusion-addtoken.yaml"), load_config(work / "small.yaml")
        ),
        work / "merged.yaml",
    )
    return work


def test_diffusers_training_with_real_class_pictures(merged, tmp_path, capsys):
    """accelerate launch src/diffusers_training.py --pretrained_model_name_or_path=$MODEL_NAME
    --instance_data_dir=./data/cat --class_data_dir=./real_reg/samples_cat/ --output_dir=./logs/cat
    --with_prior_preservation --real_prior --prior_loss_weight=1.0 --instance_prompt="photo of a <new1> cat"
    --class_prompt="cat" --resolution=512 --train_batch_size=2 --learning_rate=1e-5 --lr_warmup_steps=0
    --max_train_steps=250 --num_class_images=200 --scale_lr --hflip --modifier_token "<new1>" """
    real = tmp_path / "samples_cat"
    pictures = runs.pictures(real / "images", 2)
    (real / "images.txt").write_text("".join(f"{path}\n" for path in sorted(pictures.iterdir())))
    (real / "caption.txt").write_text("a cat on a sofa\ntwo cats\n")
    words = flags(
        merged, tmp_path / "out", "--instance_data_dir", str(merged / "cat"), "--class_data_dir", str(real),
        "--with_prior_preservation", "--real_prior", "--prior_loss_weight=0.5", "--instance_prompt",
        "photo of a <new1> cat", "--class_prompt", "cat", "--num_class_images=200", "--modifier_token", "<new1>",
    )  # fmt: skip
    Program("custom-diffusion")(words)
    delta = custom_diffusion.read(tmp_path / "out" / "delta.bin")
    assert list(delta.tokens) == ["<new1>"] and delta.weights
    (run,) = (tmp_path / "out").glob("*_custom-diffusion")
    config = load_config(run / "configs" / "project.yaml")
    assert config.model.params.reg_weight == 0.5 and config.model.base_learning_rate == pytest.approx(2e-3)
    both = {name: instantiate_from_config(config.data.params[name]) for name in ("train", "reg")}
    captions = {name: {one.sample(k)["caption"] for k in range(len(one))} for name, one in both.items()}
    assert captions["reg"] == {"a cat on a sofa", "two cats"}
    assert all("photo of a <new1> cat" in caption for caption in captions["train"])
    assert "words <new1>" in capsys.readouterr().out


def test_diffusers_training_of_several_concepts(merged, tmp_path):
    """--concepts_list=./assets/concept_list.json --modifier_token "<new1>+<new2>", with drawn class pictures."""
    concepts = [
        {"instance_data_dir": str(merged / name), "instance_prompt": f"photo of a <new{number}> {name}",
         "class_data_dir": str(tmp_path / f"class_{name}"), "class_prompt": name}
        for number, name in enumerate(("cat", "chair"), 1)
    ]  # fmt: skip
    (tmp_path / "list.json").write_text(json.dumps(concepts))
    words = flags(merged, tmp_path / "out", "--concepts_list", str(tmp_path / "list.json"), "--max_train_steps=1")
    prior = ["--with_prior_preservation", "--num_class_images=1"]
    with pytest.raises(InputError, match="has the word <new3> of --modifier_token"):
        Program("custom-diffusion")([*words, *prior, "--modifier_token", "<new1>+<new3>"])
    Program("custom-diffusion")([*words, *prior, "--modifier_token", "<new1>+<new2>"])
    assert len(custom_diffusion.read(tmp_path / "out" / "delta.bin").tokens) == 2
    assert all(len(list((tmp_path / f"class_{name}").glob("*.png"))) == 1 for name in ("cat", "chair"))
    for more, message in (
        (["--class_prompt", "cat"], "leave --class_prompt out"), (["--lr_scheduler", "linear", "--lr_warmup_steps=9"],
                                                                  "needs --max_train_steps above"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            Program("custom-diffusion")([*words, "--force", *more])


def test_an_epoch_shows_each_picture_of_all_concepts_once(merged):
    sets = [{"datapath": str(merged / name), "caption": name} for name in ("cat", "chair")]
    pictures = ConceptPictures(sets, size=32, flip_p=0, aug=False, templates="{}", seed=1)
    for epoch in range(2):
        items = [pictures.sample(k) for k in range(epoch * len(pictures), (epoch + 1) * len(pictures))]
        assert len({item["image"].numpy().tobytes() for item in items}) == len(pictures) == 6
        assert sorted(item["caption"] for item in items) == 3 * ["cat"] + 3 * ["chair"]


def test_training_begins_at_a_delta(work, tmp_path):
    """python -u train.py --base ... --delta-ckpt <delta> --modifier_token "<new1>" ..."""
    concept = f'-t --actual_resume {work}/sd-v1-4.ckpt --caption "<new1> cat" --datapath {work}/cat --batch_size 1'
    first = trained(work, "first", concept)
    Program("deltas")(["--path", str(first)])
    (path,) = (first / "checkpoints").glob("delta_epoch=*.ckpt")
    delta = custom_diffusion.read(path)
    delta.tokens["<new1>"] += 1
    delta.weights = {name: weight + 0.5 for name, weight in delta.weights.items()}
    custom_diffusion.write(tmp_path / "delta.ckpt", delta)
    second = trained(work, "second", f"{concept} --delta-ckpt {tmp_path / 'delta.ckpt'} model.base_learning_rate=1e-8")
    (adapters,) = (second / "checkpoints").glob("*-adapters")
    learnt = own.delta(adapters)
    assert all(torch.allclose(learnt.weights[name], delta.weights[name], atol=1e-4) for name in delta.weights)
    assert torch.allclose(learnt.tokens["<new1>"], delta.tokens["<new1>"], atol=1e-4)
    custom_diffusion.write(tmp_path / "wide.ckpt", custom_diffusion.Delta(delta.weights, {"<new1>": torch.ones(1, 7)}))
    for file, message in ((tmp_path / "wide.ckpt", r"shape \[1, 7\]"), (f"{work}/sd-v1-4.ckpt", "is no Custom Diff")):
        with pytest.raises(InputError, match=message):
            trained(work, "third", f"{concept} --delta-ckpt {file}")



def test_pictures_are_sent_to_weights_and_biases(monkeypatch, tmp_path):
    """sample.py --wandb_log"""
    sent = []
    run = SimpleNamespace(log=sent.append, finish=lambda: sent.append("finished"))
    wandb = SimpleNamespace(init=lambda **told: run, Image=lambda picture: picture.size)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    words = ["--prompt", "a cat", "--config", str(ROOT / "configs/sd-mini/inference.yaml"), "--ddim_steps", "1"]
    words += ["--n_iter", "1", "--device", "cpu", "--wandb_log", "--outdir", str(tmp_path)]
    Program("sample")(words)
    assert sent == [{"pictures": [(64, 64)]}, "finished"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        Program("sample")(words)
