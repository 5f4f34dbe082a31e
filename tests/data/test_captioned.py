"""The captioned pictures of SD-mini: assembled from a made-up vendor's folders, written, read back and drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.captioned import COLOURS, CaptionedPictures, draw_backgrounds, row_weights, uniforms
from ldm.data.sampling import as_samples
from ldm.errors import InputError
from scripts.sd_mini.build.archive import write_records
from scripts.sd_mini.build.assemble import all_drawings, drawing_records, photo_records
from scripts.sd_mini.build.emoji import Emoji, plain_code, plain_name
from scripts.sd_mini.build.splits import SUBJECTS, Subject, split_drawings
from scripts.sd_mini.build.subjects import write_subjects
from scripts.sd_mini.build.words import article, class_word, drawing_captions, photo_captions, phrase

CATS = ["grinning_cat", "crying_cat", "pouting_cat", "kissing_cat", "weary_cat"]
THINGS = ["robot", "house", "pizza", "green_apple", "kite", "anchor", "violin", "balloon", "bus", "cactus"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny world: five cats, ten things and a hand with two tones, drawn by three vendors; 40 photographs."""
    root = tmp_path_factory.mktemp("packages")
    names = [(name, "cat-face") for name in CATS] + [(name, "other-object") for name in THINGS]
    emoji, library = [], {}
    for number, (name, group) in enumerate([*names, ("waving_hand", "hand-fingers-open")]):
        code = f"1F{number:03X}"
        entry = {"unified": code, "sort_order": number, "subcategory": group, "image": f"{code.lower()}.png"}
        if name == "waving_hand":
            tones = {"1F3FB": f"{code}-1F3FB", "1F3FF": f"{code}-1F3FF", "1F3FB-1F3FF": f"{code}-1F3FB-1F3FF"}
            entry["skin_variations"] = {t: {"unified": u, "image": f"{u.lower()}.png"} for t, u in tones.items()}
        emoji.append(entry)
        library[chr(int(code, 16))] = [name, "nice", "sks", "thing"]
    _write(root / "names/emoji.json", json.dumps(emoji))
    _write(root / "words/dist/emoji-en-US.json", json.dumps(library))
    for shade, folder in enumerate(("noto/img/google/64", "twemoji/img/twitter/64", "fluent/assets")):
        for number, entry in enumerate(emoji):
            for image in [entry["image"], *(v["image"] for v in entry.get("skin_variations", {}).values())]:
                pixels = np.full((48, 48, 4), (10 * number, 80 * shade, 200, 255), dtype=np.uint8)
                pixels[:8] = 0  # the top is transparent
                path = root / folder / image
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path.with_suffix(".webp" if shade == 2 else ".png"), lossless=True)
    photos = np.arange(40, dtype=np.uint8)[:, None, None].repeat(1024, 1).repeat(3, 2)
    (root / "photo").mkdir()
    for number in range(2):
        Image.fromarray(photos[20 * number : 20 * number + 20]).save(root / f"photo/data_batch_{number + 1}.png")
    Image.fromarray(photos + 100).save(root / "photo/test_batch.png")
    _write(root / "photo/train_lables.json", json.dumps([i % 10 for i in range(40)]))
    _write(root / "photo/test_lables.json", json.dumps([i % 10 for i in range(40)]))
    return {key: root / key for key in ("names", "words", "noto", "twemoji", "fluent", "flat", "openmoji", "photo")}


@pytest.fixture(scope="module")
def chosen(folders):
    return split_drawings(all_drawings(folders), known=3, unseen=2)


@pytest.fixture(scope="module")
def built(folders, chosen, tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "captioned.tar.gz"
    records = [*drawing_records(chosen, processes=1), *photo_records(folders["photo"], train=30, held_out=20)]
    assert write_records(path, records) == len(records)
    return path


def _write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_table_has_names_and_tones_but_no_pairs_of_tones(folders):
    drawings = [d for d in all_drawings(folders) if d.style == "noto"]
    assert [d.emoji.tone for d in drawings if d.emoji.name == "waving hand"] == ["", "light", "dark"]
    assert plain_code("0023-FE0F-20E3") == "23-20e3"
    assert plain_name("woman_s_hat") == "woman's hat" and plain_name("three_o_clock") == "three o'clock"


@pytest.mark.parametrize(
    ("name", "group", "tone", "said", "kind"),
    [
        ("grinning cat", "cat-face", "", "a grinning cat", "cat"),
        ("orange book", "book-paper", "", "an orange book", "book"),
        ("woman shrugging", "person-gesture", "medium dark", "a woman shrugging with medium dark skin", "woman"),
        ("man red hair", "person", "", "a man with red hair", "man"),
        ("woman bald", "person", "dark", "a bald woman with dark skin", "woman"),
        ("person lifting weights", "person-sport", "", "a person lifting weights", "person"),
        ("flag japan", "country-flag", "", "the flag of japan", "flag"),
        ("three o'clock", "time", "", "a clock showing three o'clock", "clock"),
        ("family man woman boy", "family", "", "a family of a man, a woman and a boy", "family"),
        ("keycap 3", "keycap", "", "a keycap with the number 3", "keycap"),
        ("aries", "zodiac", "", "the zodiac sign aries", "zodiac sign"),
        ("eyes", "body-parts", "", "eyes", None),
        ("hot dog", "food-prepared", "", "a hot dog", None),
    ],
)
def test_phrases_are_english(name, group, tone, said, kind):
    emoji = Emoji("1f600", name, (), group, "x.png", tone)
    assert phrase(emoji) == said
    assert class_word(emoji) == kind


def test_article():
    said = [article(word) for word in ("unicorn", "umbrella", "hourglass", "glasses", "bus", "cheese wedge", "bacon")]
    assert said == ["a unicorn", "an umbrella", "an hourglass", "glasses", "a bus", "a cheese wedge", "bacon"]


def test_captions_name_style_and_class_and_never_an_identifier(built):
    emoji = Emoji("1f600", "grinning cat", ("sks", "animal", "cat", "happy"), "cat-face", "x.png")
    captions = drawing_captions(emoji, "noto")
    assert {"an emoji of a grinning cat, noto style", "a grinning cat", "an emoji of a cat"} <= set(captions)
    assert "an emoji of a grinning cat, animal, happy, noto style" in captions
    assert "a photo of a plane" in photo_captions(("airplane", "plane"))
    for split in ("train", "val_known", "val_unseen"):
        data = CaptionedPictures(built, split)
        words = {word for captions in data.captions for caption in captions for word in caption.split()}
        assert not words & {"sks", "zwx"}


def test_subjects_are_held_out_with_every_finish_of_their_family(folders, chosen):
    assert {d.emoji.name for d, s in chosen if s == "subject:noto_cat"} == {n.replace("_", " ") for n in CATS}
    trained = {(d.style, d.emoji.name) for d, s in chosen if s == "train"}
    assert not {("noto", name.replace("_", " ")) for name in CATS} & trained
    assert ("twemoji", "grinning cat") in trained  # the class stays known
    flat = [d for d in all_drawings(folders) if d.style == "fluent"]
    finishes = flat + [type(d)(d.emoji, "modern", d.family, d.path) for d in flat]
    split = split_drawings(finishes, [Subject("cat", "cat", "fluent", groups="cat-face")], known=0, unseen=0)
    of_cats = {(d.style, s) for d, s in split if d.emoji.group == "cat-face"}
    assert of_cats == {("fluent", "subject:cat")}


def test_validation_is_disjoint_from_training(chosen):
    trained = {(d.family, d.emoji.name) for d, s in chosen if s == "train"}
    known = {(d.family, d.emoji.name) for d, s in chosen if s == "val_known"}
    unseen = {d.emoji.name for d, s in chosen if s == "val_unseen"}
    assert len(known) == 3 and len(unseen) == 2
    assert not known & trained and {name for _, name in known} <= {name for _, name in trained}
    assert not unseen & {name for _, name in trained}


def test_subject_folders(folders, chosen, tmp_path):
    write_subjects(tmp_path, chosen)
    assert {p.name for p in tmp_path.iterdir()} == {subject.name for subject in SUBJECTS}
    about = json.loads((tmp_path / "noto_cat/subject.json").read_text())
    assert about["class_word"] == "cat" and about["licence"] == "Apache-2.0"
    pictures = sorted((tmp_path / "noto_cat").glob("*.png"))
    assert [p.stem for p in pictures] == sorted(CATS)
    assert all(Image.open(p).mode == "RGB" and Image.open(p).size == (64, 64) for p in pictures)


def test_draws_depend_on_seed_and_number_alone(built):
    data, other = CaptionedPictures(built, seed=3), CaptionedPictures(built, seed=4)
    batch = data.batch([5, 9, 5])
    assert batch["image"].shape == (3, 64, 64, 3) and batch["image"].dtype == torch.float32
    assert torch.equal(batch["image"][0], batch["image"][2]) and batch["caption"][0] == batch["caption"][2]
    alone = CaptionedPictures(built, seed=3)[9]
    assert torch.equal(alone["image"], batch["image"][1]) and alone["caption"] == batch["caption"][1]
    ks = range(64)
    assert data.batch(ks)["caption"] != other.batch(ks)["caption"]
    assert -1 <= data.batch(ks)["image"].min() and data.batch(ks)["image"].max() <= 1


def test_as_a_training_set_every_epoch_has_draws_of_its_own(built):
    pictures = CaptionedPictures(built, draws=4)
    assert as_samples(pictures) is pictures
    first, second = (pictures.batch(range(4 * epoch, 4 * epoch + 4))["image"] for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_pictures_stay_with_their_captions_and_are_upright(built):
    data = CaptionedPictures(built, "subject:noto_cat")
    for row, record in enumerate(data.records):
        number = CATS.index(record["name"].replace(" ", "_"))
        picture = ((data.shown([row])[0] + 1) * 127.5).round()
        assert picture[:8].min() == 255  # transparent, thus white, at the top
        assert picture[32, 32].tolist() == [10 * number, 0, 200]


def are_photographs(data, rows):
    return torch.tensor([data.records[row].get("kind") == "photo" for row in rows.tolist()])


def test_alpha_shows_the_background_and_photographs_have_none(built):
    data = CaptionedPictures(built, draws=400)
    batch = data.batch(range(400))
    photo = are_photographs(data, batch["row"])
    assert photo.any() and not photo.all()
    assert not any("background" in c for c, p in zip(batch["caption"], photo.tolist(), strict=True) if p)
    blue = [i for i, c in enumerate(batch["caption"]) if c.endswith(" on a blue background")]
    assert blue
    shade = (batch["image"][blue, 1, 1] + 1) * 127.5
    assert (shade - torch.tensor(COLOURS["blue"])).abs().max() <= 17
    assert len({tuple(p) for p in batch["image"][~photo, 1, 1].tolist()}) > 20


def test_shares_decide_how_often_a_kind_is_drawn(built):
    data = CaptionedPictures(built, shares={"drawing": 0.25, "photo": 0.75})
    photo = are_photographs(data, data.batch(range(2000))["row"]).float().mean()
    assert abs(photo - 0.75) < 0.04
    with pytest.raises(InputError, match="shares must name the kinds"):
        CaptionedPictures(built, shares={"drawing": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("option,key", [("emphasis", "class"), ("group_emphasis", "group")])
def test_emphasis_decides_how_often_a_class_or_a_group_is_drawn(built, option, key):
    shares = {"drawing": 0.5, "photo": 0.5}
    plain = CaptionedPictures(built, shares=shares)
    chosen = next(record[key] for record in plain.records if record["kind"] == "drawing" and record.get(key))
    often = CaptionedPictures(built, shares=shares, **{option: {chosen: 4.0}})

    def counts(data):
        drawn = [data.records[row] for row in data.batch(range(4000))["row"]]
        drawings = [record for record in drawn if record["kind"] == "drawing"]
        return sum(record[key] == chosen for record in drawings) / len(drawings), len(drawings) / len(drawn)

    (before, share), (after, share_after) = counts(plain), counts(often)
    assert after == pytest.approx(4 * before / (1 + 3 * before), abs=0.04) and after > before
    assert share == pytest.approx(0.5, abs=0.04) and share_after == pytest.approx(0.5, abs=0.04)
    with pytest.raises(InputError, match=f"{option}: no picture is of the {key} unicorn"):
        CaptionedPictures(built, **{option: {"unicorn": 2.0}})


def test_emphases_of_class_and_group_multiply():
    records = [{"class": "cat", "group": "cat-face"}, {"class": "cat"}, {"group": "cat-face"}, {"weight": 0.5}]
    assert row_weights(records, None, {"cat": 3.0}, {"cat-face": 0.1}).tolist() == pytest.approx([0.3, 3, 0.1, 0.5])


def test_uniforms_are_uniform_and_counted():
    u = uniforms(7, torch.arange(4000), 16)
    assert torch.equal(uniforms(7, torch.tensor([123]), 16)[0], u[123])
    assert 0 <= u.min() and u.max() < 1
    assert (u.mean(0) - 0.5).abs().max() < 0.03 and (u.var(0) - 1 / 12).abs().max() < 0.01
    assert torch.corrcoef(u.T).fill_diagonal_(0).abs().max() < 0.07


def test_backgrounds_are_white_often_enough_and_varied():
    pictures, words = draw_backgrounds(uniforms(0, torch.arange(1000), 13), 16)
    assert pictures.shape == (1000, 16, 16, 3) and 0 <= pictures.min() and pictures.max() <= 255
    white = (pictures == 255).flatten(1).all(1).float().mean()
    assert 0.25 < white < 0.4
    assert {" on a white background", " on a striped background", " on a checkered background"} <= set(words)


def test_bad_files_are_named_in_one_line(built, tmp_path):
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(built.read_bytes()[:3000])
    for path, split, message in [
        (tmp_path / "absent.tar", "train", "no captioned pictures at"),
        (broken, "train", "no readable tar"),
        (built, "test", "no picture of split"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            CaptionedPictures(path, split)
        assert "\n" not in str(error.value)
