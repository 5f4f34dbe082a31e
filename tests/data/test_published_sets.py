"""The data sets that published configs name: ImageNet, LSUN, faces, captioned sets; a step on each kind of config."""

import io
import json

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ldm.aliases import ALIASES
from ldm.commands import Program
from ldm.config import instantiate_from_config
from ldm.data.imagenet import ImageNetSRTrain, ImageNetTrain
from ldm.data.lsun import LSUNChurchesTrain
from ldm.data.simple import TextOnly, hf_dataset
from ldm.errors import InputError
from ldm.trust import foreign_targets
from ldm.tuning.embedding_manager import embedding_manager
from tests import runs

# The folders that the published classes read.
PLACES = (
    "ILSVRC2012_train/n01", "ILSVRC2012_train/n02", "ILSVRC2012_validation/n01", "ILSVRC2012_validation/n02",
    "lsun/churches", "lsun/bedrooms", "celebahq", "ffhq",
)  # fmt: skip
CONFIGS = ["latent-diffusion/" + name for name in ("celebahq-ldm-vq-4", "cin-ldm-vq-f8", "ffhq-ldm-vq-4",
                                                   "lsun_bedrooms-ldm-vq-4", "lsun_churches-ldm-kl-8")]  # fmt: skip
CONFIGS += [f"autoencoder/autoencoder_kl_{size}" for size in ("8x8x64", "16x16x16", "32x32x4", "64x64x3")]
TRANSFORMS = [
    {"target": "torchvision.transforms.Resize", "params": {"size": 32, "interpolation": 3}},
    {"target": "torchvision.transforms.RandomCrop", "params": {"size": 32}},
    {"target": "torchvision.transforms.RandomHorizontalFlip"},
]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("published")
    for number, place in enumerate(PLACES):
        runs.pictures(work / "data" / place, 2, seed=number)
    return work


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sets_of_a_published_config_are_built(golden, work, monkeypatch, name):
    monkeypatch.chdir(work)
    published = json.loads((golden / "manifests/published_configs.json").read_text())
    sets = published[f"stable-diffusion/configs/{name}.yaml"]["data"]["params"]
    assert not foreign_targets({"data": sets}, ALIASES)
    for kind in ("train", "validation"):
        shown = instantiate_from_config(sets[kind])
        epoch = [shown.sample(k) for k in range(len(shown))]
        assert len({item["relpath"] for item in epoch}) == len(shown) >= 2
        assert all(item["image"].shape == (256, 256, 3) and item["image"].abs().max() <= 1 for item in epoch)
        if "imagenet" in sets[kind]["target"]:
            assert {item["class_label"]: item["synset"] for item in epoch} == {0: "n01", 1: "n02"}
        again = shown.sample(1)
        assert torch.equal(again["image"], epoch[1]["image"])


def test_a_list_names_the_pictures(work, monkeypatch):
    monkeypatch.chdir(work)
    (work / "list.txt").write_text("1.png\n")
    assert LSUNChurchesTrain("list.txt", size=32).sample(0)["relpath"] == "1.png"
    (work / "list.txt").write_text("7.png\n")
    with pytest.raises(InputError, match=r"names 7.png, which is not in data.lsun.churches \(1 such\)"):
        LSUNChurchesTrain("list.txt", size=32)
    with pytest.raises(InputError, match="the folder data/absent does not exist"):
        LSUNChurchesTrain(data_root="data/absent")
    with pytest.raises(InputError, match="unknown argument 'sub_indices'"):
        ImageNetTrain({"size": 32, "sub_indices": "0-9"})


def test_upscaling_pairs_show_the_same_square(work, monkeypatch):
    monkeypatch.chdir(work)
    item = ImageNetSRTrain(size=32, degradation="pil_bilinear").sample(3)
    assert item["image"].shape == (32, 32, 3) and item["LR_image"].shape == (8, 8, 3)
    small = torch.nn.functional.avg_pool2d(item["image"].permute(2, 0, 1), 4)
    assert (small - item["LR_image"].permute(2, 0, 1)).abs().mean() < 0.1
    with pytest.raises(InputError, match="degradation 'bsrgan' is not supported"):
        ImageNetSRTrain(size=32, degradation="bsrgan")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """A captioned set as the hub keeps it: the bytes of pictures, and texts."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install .[parquet]")
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("set")
    rows = []
    for path in sorted(runs.pictures(folder / "pictures", 3).iterdir()):
        buffer = io.BytesIO()
        Image.open(path).save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": path.name}, "text": f"a drawing {path.stem}"})
    (folder / "hub" / "data").mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(rows[:2]), folder / "hub/data/train-00000-of-00001.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows[2:]), folder / "hub/data/test-00000-of-00001.parquet")
    return folder


def test_captioned_sets_in_the_layouts_of_datasets(parquet):
    shown = hf_dataset(str(parquet / "hub"), TRANSFORMS)
    epoch = [shown.sample(k) for k in range(2)]
    assert {item["txt"] for item in epoch} == {"a drawing 0", "a drawing 1"}
    assert all(item["image"].shape == (32, 32, 3) for item in epoch)
    assert hf_dataset(str(parquet / "hub"), split="test").captions == ["a drawing 2"]
    (parquet / "pictures/metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n')
    beside = hf_dataset("imagefolder", TRANSFORMS, data_dir=str(parquet / "pictures"), caption_key="caption")
    assert len(beside) == 1 and beside.sample(5)["caption"] == "one"
    for given, message in (
        ({"name": "someone/absent"}, "hf download --repo-type dataset someone/absent"),
        ({"name": str(parquet / "hub"), "text_column": "caption"}, "no column caption; it has image, text"),
        ({"name": str(parquet / "hub"), "image_transforms": [{"target": "os.system"}]}, "'os.system' is not supported"),
    ):
        with pytest.raises(InputError, match=message):
            hf_dataset(**given)


@pytest.mark.slow
def test_a_step_on_captions_of_a_table_under_the_published_names(parquet, tmp_path):
    """configs with ddpm_pokemon and hf_dataset: the model learns, and the sample pictures are of TextOnly's prompts."""
    data = {
        "target": "main.DataModuleFromConfig",
        "params": {
            "batch_size": 1, "num_workers": 0, "num_val_workers": 0, "reg": None,
            "train": {"target": "ldm.data.simple.hf_dataset",
                      "params": {"name": str(parquet / "hub"), "image_transforms": TRANSFORMS}},
            "validation": {"target": "ldm.data.simple.TextOnly",
                           "params": {"captions": ["a bird", "a house"], "output_size": 32, "n_gpus": 2}},
        },
    }  # fmt: skip
    model = {
        "target": "ldm.models.diffusion.ddpm_pokemon.LatentDiffusion",
        "params": {"cond_stage_key": "txt", "first_stage_key": "image", "monitor": None},
    }
    plain = OmegaConf.load(runs.TINY)
    from ldm.config import load_config

    config = load_config(runs.TINY)
    config.pop("data")
    config = OmegaConf.merge(config, {"model": model, "data": data})
    config.lightning.callbacks = {
        "image_logger": {"target": "main.ImageLogger", "params": {"batch_frequency": 1, "steps": 1}}
    }
    config.lightning.trainer.max_steps = plain.lightning.trainer.max_steps // 4
    OmegaConf.save(config, tmp_path / "pokemon.yaml")
    Program("fit")(["--base", str(tmp_path / "pokemon.yaml"), "-t", "--logdir", str(tmp_path / "logs"), "-n", "pokemon",
                    "--accelerator", "cpu"])  # fmt: skip
    run = runs.find_run(tmp_path, "pokemon")
    assert (run / "checkpoints" / "last.ckpt").is_file()
    assert {path.name for path in (run / "images").glob("*.png")} == {"000000.png", "000001.png"}


def test_text_alone_is_prompts(parquet):
    assert TextOnly(["a", "b"], n_gpus=2).prompts == ["a", "b"] and len(TextOnly(["a", "b"], n_gpus=2)) == 4
    with pytest.raises(InputError, match="expected a list of texts"):
        TextOnly([])


def test_personalization_config_names_words_that_learn():
    (entry,) = embedding_manager(["<it>"], ["sculpture"], num_vectors_per_token=2)
    assert entry["params"]["words"] == {"<it>": {"init_word": "sculpture", "vectors": 2}}
    assert embedding_manager(["*"], []) == []  # words of a file: the published config for sampling
    with pytest.raises(InputError, match="1 initializer_words for 2"):
        embedding_manager(["<a>", "<b>"], ["cat"])


@pytest.mark.slow
def test_a_model_with_personalization_config_is_built():
    from ldm.config import load_config

    config = load_config(runs.TINY).model
    config.params.train_level = None
    words = {"placeholder_strings": ["<it>"], "initializer_words": ["dog"], "per_image_tokens": False}
    config.params.personalization_config = {
        "target": "ldm.modules.embedding_manager.EmbeddingManager", "params": words
    }  # fmt: skip
    config.params.unet_config.params.adapter_config = None
    learning = instantiate_from_config(config).trainable_parameters()
    assert len(learning) == 1 and all("new_tokens" in name for name in learning)
