"""The DreamBooth data: captions, flips, and that sample k is the same thing whoever asks for it and whenever."""

import json
import pickle
from collections import Counter

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm.config import instantiate_from_config
from ldm.data import dreambooth
from ldm.data.dreambooth import DreamBoothPairs, PersonalizedBase
from ldm.data.pictures import find_pictures, read_picture, to_tensor
from ldm.data.sampling import ResumableBatches
from ldm.errors import InputError
from tests.helpers import assert_close_to


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures of 12 x 8, darker from left to right, told apart by their blue."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        picture = Image.linear_gradient("L").resize((12, 8)).transpose(Image.Transpose.ROTATE_270).resize((12, 8))
        blue = Image.new("L", (12, 8), 50 * number)
        Image.merge("RGB", (picture, picture, blue)).save(root / f"{number}.png")
    return root


def subject(folder, **changes) -> PersonalizedBase:
    return PersonalizedBase(folder, **{"size": 8, "repeats": 4, "class_word": "dog", **changes})


def number_of(item) -> int:
    """Which of the five pictures an item shows."""
    return round((item["image"][0, 0, 2].item() + 1) * 127.5 / 50)


def is_flipped(item) -> bool:
    return bool(item["image"][0, 0, 0] < item["image"][0, -1, 0])


def same(a, b) -> bool:
    return torch.equal(a["image"], b["image"]) and a["caption"] == b["caption"]


def test_an_item_is_a_picture_in_ldm_layout_with_its_caption(folder):
    data = subject(folder, set="val")
    item = data[1]
    assert item.keys() == {"image", "caption"}
    assert item["image"].shape == (8, 8, 3) and item["image"].dtype == torch.float32 and item["image"].is_contiguous()
    expected = to_tensor(read_picture(find_pictures(folder)[1]), 8)
    assert torch.equal(item["image"].permute(2, 0, 1), expected)
    assert len(data) == 20 == len(list(data))


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({}, "photo of a sks dog"),
        ({"reg": True}, "photo of a dog"),
        ({"placeholder_token": "zwx"}, "photo of a zwx dog"),
        ({"placeholder_token": "zwx", "identifier": "ohwx"}, "photo of a ohwx dog"),
        ({"class_word": None}, "photo of a sks"),
        ({"coarse_class_text": "small"}, "photo of a small sks dog"),
        ({"templates": "a {} in the snow"}, "a sks dog in the snow"),
        ({"templates": "a {} in the snow", "reg": True}, "a dog in the snow"),
        ({"templates": ["{word}, the {identifier} one"]}, "dog, the sks one"),
        ({"templates": "no field"}, "no field"),
        ({"per_image_tokens": True, "mixing_prob": 1.0}, "photo of a sks3 dog"),
        ({"per_image_tokens": True, "mixing_prob": 0}, "photo of a sks dog"),
    ],
)
def test_captions(folder, arguments, expected):
    assert subject(folder, set="val", **arguments)[3]["caption"] == expected


def test_templates_are_mixed(folder):
    data = subject(folder, templates=["a {}", "the {}", "one {}"])
    counts = Counter(data[k]["caption"] for k in range(300))
    assert counts.keys() == {"a sks dog", "the sks dog", "one sks dog"} and min(counts.values()) > 70


def test_some_draws_name_their_picture_by_its_own_identifier(folder):
    data = subject(folder, per_image_tokens=True, mixing_prob=0.25)
    items = [data[k] for k in range(400)]
    own = [item for item in items if item["caption"] != "photo of a sks dog"]
    assert 70 < len(own) < 130
    assert all(item["caption"] == f"photo of a sks{number_of(item)} dog" for item in own)


@pytest.mark.parametrize("flip_p", [0, 0.2, 0.5, 1])
def test_flips_happen_as_often_as_asked(folder, flip_p):
    data = subject(folder, flip_p=flip_p)
    flips = [is_flipped(data[k]) for k in range(500)]
    assert abs(sum(flips) / 500 - flip_p) < 0.06
    if flip_p in (0, 1):
        assert set(flips) == {bool(flip_p)}


def test_validation_goes_through_the_pictures_in_order_and_never_flips(folder):
    data = subject(folder, set="val", flip_p=1.0)
    assert [number_of(item) for item in data] == [0, 1, 2, 3, 4] * 4
    assert not any(is_flipped(item) for item in data)


def test_an_epoch_shows_every_picture_equally_often_in_an_order_of_its_own(folder):
    data = subject(folder)
    epochs = [[number_of(data[epoch * 20 + k]) for k in range(20)] for epoch in range(3)]
    for order in epochs:
        assert Counter(order) == dict.fromkeys(range(5), 4)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [0, 1, 2, 3, 4] * 4


def test_a_draw_depends_on_its_number_and_the_seed_alone(folder):
    data, again = subject(folder, templates=["a {}", "the {}"]), subject(folder, templates=["a {}", "the {}"])
    forwards = [data[k] for k in range(50)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    backwards = [again[k] for k in reversed(range(50))][::-1]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(same, forwards, backwards))
    other = subject(folder, templates=["a {}", "the {}"], seed=1)
    assert not all(same(item, other[k]) for k, item in enumerate(forwards))
    with pytest.raises(IndexError):
        data[-1]


def test_the_two_sets_of_a_pair_flip_independently(folder):
    pairs = DreamBoothPairs(subject(folder), subject(folder, reg=True))
    both = Counter(tuple(is_flipped(item) for item in pairs[k]) for k in range(200))
    assert len(both) == 4 and min(both.values()) > 25


def test_the_cache_changes_nothing_and_is_bounded(folder, monkeypatch):
    reads = []
    monkeypatch.setattr(dreambooth, "read_picture", lambda path: reads.append(path) or read_picture(path))
    plain = [item["image"] for item in subject(folder, cache=False)]
    assert len(reads) == 20
    reads.clear()
    cached = subject(folder)
    assert all(map(torch.equal, plain, (item["image"] for item in cached)))
    assert all(map(torch.equal, plain, (item["image"] for item in cached)))
    assert sorted(reads) == find_pictures(folder)
    monkeypatch.setattr(dreambooth, "CACHE_BYTES", 2 * 8 * 8 * 3)
    reads.clear()
    bounded = subject(folder)
    assert all(map(torch.equal, plain, (item["image"] for item in bounded)))
    assert len(reads) == 2 + 3 * 4  # two of the five pictures are kept in memory


def batches(folder, start: int, workers: int, count: int, rank: int = 0, world_size: int = 1) -> list:
    """`count` batches of two, over epochs of seven batches, from number `start` on."""
    pairs = DreamBoothPairs(subject(folder, templates=["a {}", "the {}"]), subject(folder, reg=True, repeats=1))
    sampler = ResumableBatches(2, start, 7, rank, world_size)
    loader = DataLoader(pairs, batch_sampler=sampler, num_workers=workers)
    found = []
    while len(found) < count:
        found += list(loader)
    return found[:count]


def test_collated_pairs_are_what_ldm_trains_on(folder):
    train, reg = batches(folder, 0, 0, 1)[0]
    assert train["image"].shape == reg["image"].shape == (2, 8, 8, 3)
    assert len(train["caption"]) == 2 and reg["caption"] == ["photo of a dog"] * 2
    alone = DreamBoothPairs(subject(folder))
    assert len(alone) == 20 and len(alone[0]) == 1 and same(alone[3][0], subject(folder)[3])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_starts_anywhere_reproduces_the_tail(folder, workers):
    whole = batches(folder, 0, 0, 21)
    for start in (0, 3, 7, 13):
        tail = batches(folder, start, workers, 21 - start)
        for expected, actual in zip(whole[start:], tail, strict=True):
            assert all(map(same, expected, actual))


def test_batches_of_draws():
    sampler = ResumableBatches(batch_size=2, start_batch=4, batches_per_epoch=3)
    assert list(sampler) == [[8, 9], [10, 11]]  # the rest of the second epoch
    assert list(sampler) == [[12, 13], [14, 15], [16, 17]]
    assert len(sampler) == 3
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler) == [[18, 19], [20, 21], [22, 23]]
    assert list(ResumableBatches(1, start_batch=3, batches_per_epoch=3)) == [[3], [4], [5]]


def test_ranks_are_disjoint_and_leave_no_gap():
    ranks = [sum(ResumableBatches(2, 0, 5, rank, 3), []) for rank in range(3)]
    assert ranks[1][:4] == [2, 3, 8, 9]
    assert sorted(sum(ranks, [])) == list(range(30))


def test_reading_only_the_known_length_still_moves_to_the_next_epoch():
    sampler = ResumableBatches(1, batches_per_epoch=2)
    for epoch in range(3):
        reader = iter(sampler)
        assert [next(reader) for _ in range(len(sampler))] == [[2 * epoch], [2 * epoch + 1]]


class Listener(pl.LightningModule):
    """Writes down which draws arrive, and saves a checkpoint after step number `save_at`."""

    def __init__(self, save_at: int, path) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.save_at, self.path = save_at, path
        self.heard = []

    def training_step(self, batch, _):
        self.heard.append(batch.tolist())
        return self.weight**2

    def on_train_batch_end(self, *_):
        if self.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:.*dataloader is not resumable", "ignore:.*is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 4, 6, 8])
def test_lightning_resumes_within_an_epoch(tmp_path, workers, stop):
    path = tmp_path / "last.ckpt"

    def fit(steps: int, start: int = 0, checkpoint=None) -> list:
        loader = DataLoader(range(100), batch_sampler=ResumableBatches(2, start, 4), num_workers=workers)
        listener = Listener(stop, path)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=steps, use_distributed_sampler=False, enable_checkpointing=False, **quiet
        )
        trainer.fit(listener, loader, ckpt_path=checkpoint)
        return listener.heard

    assert fit(stop) + fit(13, stop, path) == [[2 * batch, 2 * batch + 1] for batch in range(13)]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": None}, "size: expected a number of pixels such as 512, got None"),
        ({"size": 0}, "size: expected"),
        ({"size": "512"}, "size: expected"),
        ({"repeats": 0}, "repeats: expected"),
        ({"repeats": 1.5}, "repeats: expected"),
        ({"interpolation": "cubic"}, "interpolation: expected one of nearest, .*, got 'cubic'"),
        ({"flip_p": 1.5}, "flip_p: expected"),
        ({"mixing_prob": -0.1}, "mixing_prob: expected"),
        ({"set": "eval"}, "set: expected one of train, val, validation, test, got 'eval'"),
        ({"seed": -1}, "seed: expected"),
        ({"per_image_tokens": "yes"}, "per_image_tokens: expected true or false"),
        ({"reg": 1}, "reg: expected true or false"),
        ({"identifier": " "}, "identifier: expected"),
        ({"class_word": 3}, "class_word: expected a word such as dog, got 3"),
        ({"class_word": None, "reg": True}, "class_word: expected a word such as dog, got None"),
        ({"coarse_class_text": 3}, "coarse_class_text: expected"),
        ({"templates": []}, "templates: expected a caption"),
        ({"templates": ["a {}", None]}, "templates: expected a caption"),
        ({"templates": "a {token}"}, "has the field 'token', expected {} or {identifier}, {word}"),
        ({"templates": "a {identifier}", "reg": True}, "templates: .* expected {} or {word}"),
        ({"templates": "a {"}, "templates: 'a {' cannot be read"),
        ({"data_root": None}, "data_root: expected the path of a folder with pictures, got None"),
        ({"data_root": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_refusals_name_the_key(folder, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        PersonalizedBase(**{"data_root": folder, "size": 8, "class_word": "dog", **changes})
    assert "\n" not in str(caught.value)


def test_unknown_keys_are_refused_by_name(folder):
    config = {"target": "ldm.data.personalized_dream.PersonalizedBase", "params": {"data_root": str(folder), "sise": 8}}
    with pytest.raises(InputError, match="unknown sise; did you mean .* it takes data_root"):
        instantiate_from_config(config)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0,), "batch_size must be at least 1, got 0"),
        ((1, 0, 0), "an epoch has 0 batches"),
        ((1, -1), "start_batch >= 0"),
        ((1, 0, 1, 2, 2), "rank 2 of 2"),
        ((1, 0, 1, 0, 0), "world_size must be at least 1"),
    ],
)
def test_batches_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ResumableBatches(*arguments)


def test_the_data_section_of_the_published_yaml_builds(shared, golden):
    """Its values as published, for real photographs; the folders come from the command line."""
    published = json.loads((golden / "manifests/published_configs.json").read_text())
    section = published["unet-finetune/configs/sd-inject-dreambooth/attn2o-ffni.yaml"]["data"]["params"]
    photographs, of_the_class = shared / "data/dreambench/dog", shared / "data/class_images/dog"
    given = {"data_root": str(photographs), "class_word": "dog"}
    train = instantiate_from_config(section["train"], **given)
    validation = instantiate_from_config(section["validation"], **given)
    reg = instantiate_from_config(section["reg"], **{**given, "data_root": str(of_the_class)})
    assert (len(train), len(validation), len(reg)) == (500, 50, 300)
    instance, of_class = DreamBoothPairs(train, reg)[499]
    assert instance["image"].shape == of_class["image"].shape == (512, 512, 3)
    assert (instance["caption"], of_class["caption"]) == ("photo of a sks dog", "photo of a dog")
    assert instance["image"].min() >= -1 and instance["image"].max() <= 1 and instance["image"].std() > 0.2
    expected = to_tensor(read_picture(photographs / "02.jpg"), 512).permute(1, 2, 0)
    assert_close_to(validation[2]["image"], expected, 1e-6)
