"""Captions from files, tables, names and folders; how they vary; and that nothing about them is silent."""

import json
import logging
from collections import Counter

import pyarrow
import pytest
from pyarrow import parquet

from ldm.data import captions
from ldm.data.captions import caption_in, find_captions, kohya_name
from ldm.data.dreambooth import PersonalizedBase
from ldm.data.folder import CaptionedFolder
from ldm.errors import InputError
from tests.runs import differences, last, pictures, resume, train


@pytest.fixture
def folder(tmp_path):
    """A folder with three pictures: 0.png, 1.png and 2.png."""
    return pictures(tmp_path / "photos", 3)


@pytest.fixture
def said(caplog):
    """What is logged, line by line; nothing of it was said before."""
    for told in (captions._tell, captions._tell_alone, captions.tell_unread):
        told.cache_clear()
    with caplog.at_level(logging.INFO):
        yield lambda: [record.getMessage() for record in caplog.records]


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name[1:]}.txt").write_text(text)


def shown(folder, **settings) -> list[list[str]]:
    """The captions of each picture."""
    return [list(texts) for texts in CaptionedFolder(folder, size=8, **settings).captions.texts]


def drawn(folder, number=200, **settings) -> list[str]:
    data = CaptionedFolder(folder, size=8, captions=settings)
    return [data.choose(k).caption for k in range(number)]


def test_text_files_beside_the_pictures(folder, said):
    write(folder, _0="a red dog\n", _1="\n a blue dog \n\n the dog, blue\n")
    (folder / "2.png.caption").write_text("\ufeffa green dog")
    assert shown(folder) == [["a red dog"], ["a blue dog", "the dog, blue"], ["a green dog"]]
    assert said() == [f"{folder}: 3 pictures, 4 captions from .txt and .caption"]


@pytest.mark.parametrize("table", captions.TABLES)
def test_tables(folder, table, said):
    rows = [{"file_name": f"{n}.png", "text": f"dog, {n}"} for n in range(3)]
    kinds = {
        "metadata.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, rows)) + "\n"),
        "metadata.csv": lambda path: path.write_text(
            "file_name,text\n" + "".join(f'{row["file_name"]},"{row["text"]}"\n' for row in rows)
        ),
        "metadata.parquet": lambda path: parquet.write_table(pyarrow.Table.from_pylist(rows), path),
    }
    kinds[table](folder / table)
    assert shown(folder) == [["dog, 0"], ["dog, 1"], ["dog, 2"]]
    assert said() == [f"{folder}: 3 pictures, 3 captions from {table}"]


def test_a_row_may_have_several_captions(folder):
    row = {"file_name": "0.png", "text": ["a dog", "the dog"]}
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    assert shown(folder, templates="a {}", class_word="thing") == [["a dog", "the dog"], [], []]


def test_names_of_files_and_folders(folder, tmp_path, said):
    assert [caption_in(name) for name in ("a_red_dog (2).png", "a red dog-12.jpg", "dog.png", "k9.png", "7.png")] == [
        "a red dog", "a red dog", "dog", "k9", "7",
    ]  # fmt: skip
    assert shown(folder, captions="filename") == [["0"], ["1"], ["2"]]
    named = folder.rename(tmp_path / "10_sks dog")
    assert kohya_name(named) == (10, "sks dog") and kohya_name(folder) is None
    data = CaptionedFolder(named, size=8)
    assert len(data) == 30 and {data.choose(k).caption for k in range(9)} == {"sks dog"}
    assert len(CaptionedFolder(named, size=8, repeats=2)) == 6
    assert said()[-1] == f"{named}: 3 pictures, 3 captions from the folder's name, 'sks dog'"
    assert find_captions(folder.parent / "sks cat", ("0.png",), "folder")[0] == {"0.png": ("sks cat",)}


def test_the_first_source_that_has_captions_is_taken(folder, tmp_path):
    folder = folder.rename(tmp_path / "3_sks dog")
    (folder / "metadata.csv").write_text("file_name,text\n0.png,from the table\n")
    template = {"templates": "an {}", "identifier": "owl"}
    assert shown(folder, **template)[0] == ["from the table"]
    write(folder, _0="from the file")
    assert shown(folder, **template) == [["from the file"], [], []]
    assert shown(folder, captions="metadata", **template)[0] == ["from the table"]
    data = CaptionedFolder(folder, size=8, captions="template", **template)
    assert data.choose(0).caption == "an owl"


def test_what_has_no_partner_is_named(folder, said):
    write(folder, _0="a dog", _7="nobody", _1="\n")
    data = CaptionedFolder(folder, size=8, templates="a {}", class_word="cat", set="val")
    assert [data.choose(k).caption for k in range(3)] == ["a dog", "a sks cat", "a sks cat"]
    assert said()[:3] == [
        f"{folder}: 1 captions without a picture: 7.txt",
        f"{folder}: 3 pictures, 1 captions from .txt",
        f"{folder}: 2 pictures without a caption: 1.png, 2.png",
    ]
    CaptionedFolder(folder, size=8, templates="a {}", class_word="cat")
    assert sum("pictures, 1 captions" in line for line in said()) == 1  # said once


def test_dreambooth_says_that_captions_are_not_read_and_reads_them_when_asked(folder, said):
    write(folder, _0="sks dog on grass")
    data = PersonalizedBase(folder, size=8, class_word="dog")
    assert {data.choose(k).caption for k in range(20)} == {"photo of a sks dog"}
    assert said() == [
        f"{folder} has 1 caption files, which are not read: captions are made from the template; "
        "--captions auto reads them"
    ]
    data = PersonalizedBase(folder, size=8, class_word="dog", captions="auto", set="val")
    assert [data.choose(k).caption for k in range(3)] == ["sks dog on grass", *["photo of a sks dog"] * 2]
    assert data.all_captions() == ["photo of a sks dog", "sks dog on grass"]
    write(folder, _0="a dog on grass")
    PersonalizedBase(folder, size=8, class_word="dog", captions="auto")
    assert said()[-1] == f"{folder}: no caption has the identifier sks; add it, or captions.prefix='sks dog'"


def test_tags_change_places_and_the_first_ones_stay(folder):
    write(folder, _0="sks, dog, a, b, c", _1="sks, dog, a, b, c", _2="sks, dog, a, b, c")
    found = Counter(drawn(folder, 600, shuffle_tags=True, keep_tags=2))
    assert len(found) == 6 and min(found.values()) > 60
    assert all(caption.startswith("sks, dog, ") for caption in found)
    lengths = Counter(caption.count(",") + 1 for caption in drawn(folder, 900, tag_dropout=0.5, keep_tags=2))
    assert set(lengths) == {2, 3, 4, 5} and abs(lengths[2] / 900 - 1 / 8) < 0.04
    dots = drawn(folder, 50, shuffle_tags=True, keep_tags=1, separator=";")
    assert set(dots) == {"sks, dog, a, b, c"}  # one tag: there is no semicolon


def test_captions_drop_out_vary_and_have_a_frame(folder):
    write(folder, _0="a\nb\nc", _1="a\nb\nc", _2="a\nb\nc")
    found = Counter(drawn(folder, 900, dropout=0.2, prefix="sks,", suffix=" film"))
    assert set(found) == {"", "sks, a film", "sks, b film", "sks, c film"}
    assert abs(found[""] / 900 - 0.2) < 0.04 and min(found.values()) > 150


def test_a_draw_depends_on_its_number_and_the_seed_alone(folder):
    write(folder, _0="a, b, c, d\ne, f, g", _1="h, i, j, k", _2="l, m, n")
    settings = {"shuffle_tags": True, "tag_dropout": 0.3, "dropout": 0.1}
    whole = drawn(folder, 40, **settings)
    data = CaptionedFolder(folder, size=8, captions=settings)
    assert [data.choose(k).caption for k in reversed(range(40))] == whole[::-1]
    other = CaptionedFolder(folder, size=8, captions=settings, seed=1)
    assert [other.choose(k).caption for k in range(40)] != whole
    plain = CaptionedFolder(folder, size=8)  # captions do not change pictures and flips
    assert [data.choose(k)[:2] for k in range(40)] == [plain.choose(k)[:2] for k in range(40)]
    val = CaptionedFolder(folder, size=8, captions=settings, set="val")
    assert val.choose(0).caption == "a, b, c, d"  # a validation does not vary


BAD = {
    "txt": (lambda f: None, "captions: txt finds none in {f}: expected 0.txt beside 0.png"),
    "metadata": (lambda f: None, "captions: metadata finds none in {f}: expected metadata.jsonl"),
    "auto": (lambda f: write(f, _0="a"), "{f}: no caption for 1.png, 2.png; write 1.txt beside it"),
    "text": (lambda f: None, "captions.source must be auto or txt or metadata or filename or folder or template, got "),
}
TABLES = {
    "metadata.jsonl": ('{"file_name": "0.png"}', "row 1: expected file_name and text, a caption or a list of them"),
    "metadata.csv": ("name,text\n0.png,a\n", "row 1: expected file_name and text"),
    "metadata.parquet": ("no parquet", "cannot be read (Parquet magic bytes not found"),
}


@pytest.mark.parametrize("source", BAD)
def test_a_source_without_captions_is_refused(folder, source):
    prepare, message = BAD[source]
    prepare(folder)
    with pytest.raises(InputError) as caught:
        CaptionedFolder(folder, size=8, captions=source)
    assert message.format(f=folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("table", TABLES)
def test_a_broken_table_is_refused(folder, table):
    (folder / table).write_text(TABLES[table][0])
    with pytest.raises(InputError) as caught:
        CaptionedFolder(folder, size=8)
    assert str(folder / table) in str(caught.value) and TABLES[table][1] in str(caught.value)


def test_two_tables_and_misspelt_settings_are_refused(folder):
    with pytest.raises(InputError, match="captions.shufle_tags is unknown; did you mean shuffle_tags"):
        CaptionedFolder(folder, size=8, captions={"shufle_tags": True})
    for table in ("metadata.jsonl", "metadata.csv"):
        (folder / table).write_text("")
    with pytest.raises(InputError, match="has metadata.jsonl and metadata.csv: expected one table"):
        CaptionedFolder(folder, size=8)


@pytest.mark.slow
def test_a_run_reads_captions_and_resumes_exactly(tmp_path):
    """Tags in other orders, dropped captions and several of them, across a resume."""
    photos = pictures(tmp_path / "photos", 4)
    pictures(tmp_path / "class", 3, seed=1)
    write(photos, _0="sks dog, red, left", _1="sks dog, blue\nthe sks dog", _2="sks dog, a, b, c", _3="sks dog, d, e")
    words = ["--captions", "txt", "data.params.train.params.captions={shuffle_tags: true, dropout: 0.2, keep_tags: 1}"]
    words += ["lightning.callbacks.image_logger.params.disabled=true"]
    whole = train(tmp_path, "whole", "--max_steps", 6, *words)
    part = train(tmp_path, "part", "--max_steps", 4, *words)
    resume(part, "--max_steps", "6")
    assert differences(last(whole)["state_dict"], last(part)["state_dict"]) == []
    plain = train(tmp_path, "plain", "--max_steps", 6, words[-1])
    assert differences(last(whole)["state_dict"], last(plain)["state_dict"]) != []
