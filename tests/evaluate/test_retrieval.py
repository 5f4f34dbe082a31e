"""`ldm class-pictures`: real pictures of a class out of folders, tars and tables."""

import io
import json
import tarfile

import pytest

from ldm.commands import Program
from ldm.data.custom import MaskBase
from ldm.data.pictures import find_pictures
from ldm.errors import InputError
from ldm.evaluate.retrieval import read_index
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
CLIP = str(ROOT / "models/sd-mini/clip")


@pytest.fixture(scope="module")
def pictures():
    """Drawings of a cat and of a woman with captions: (name, bytes, caption)."""
    found = []
    for word in ("cat", "woman"):
        for number, path in enumerate(find_pictures(ROOT / f"examples/subjects/noto_{word}", (".json",))[:4]):
            found.append((f"{word}{number}", path.read_bytes(), f"an emoji of a {word}"))
    return found


@pytest.fixture(scope="module")
def indexes(pictures, tmp_path_factory):
    """The same pictures as a folder, as a WebDataset and as a table."""
    work = tmp_path_factory.mktemp("indexes")
    (work / "folder").mkdir(), (work / "shards").mkdir()
    with tarfile.open(work / "shards" / "0.tar", "w") as archive:
        for number, (name, encoded, caption) in enumerate(pictures):
            (work / "folder" / f"{name}.png").write_bytes(encoded)
            (work / "folder" / f"{name}.txt").write_text(caption)
            text = {"json": json.dumps({"caption": caption})} if number % 2 else {"txt": caption}
            for ending, content in (("png", encoded), *((end, value.encode()) for end, value in text.items())):
                member = tarfile.TarInfo(f"part/{name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install .[parquet]")
    from pyarrow import parquet

    rows = [{"image": {"bytes": encoded, "path": None}, "text": caption} for _, encoded, caption in pictures]
    parquet.write_table(arrow.Table.from_pylist(rows), work / "table.parquet")
    return {"folder": work / "folder", "tar": work / "shards", "table": work / "table.parquet"}


@pytest.mark.parametrize("kind", ["folder", "tar", "table"])
def test_an_index_has_pictures_and_captions(indexes, pictures, kind):
    found = {(pair.encoded, pair.caption) for pair in read_index(indexes[kind])}
    assert found == {(encoded, caption) for _, encoded, caption in pictures}


@pytest.mark.parametrize("by", ["picture", "caption"])
def test_the_pictures_of_the_class_come_first(indexes, tmp_path, capsys, by):
    """python src/retrieve.py --class_prompt cat --class_data_dir real_reg/samples_cat --num_class_images 200"""
    folder = tmp_path / "samples_cat"
    words = ["--class_prompt", "an emoji of a cat", "--class_data_dir", str(folder), "--num_class_images", "4"]
    words += ["--by", by, "--network", CLIP, "--cache", "off", "--device", "cpu"]
    with pytest.raises(InputError, match="--index is missing"):
        Program("class-pictures")(words)
    words += ["--index", str(indexes["tar"]), "--index", str(indexes["folder"])]  # the second has the same pictures
    Program("class-pictures")(words)
    assert (folder / "caption.txt").read_text().splitlines() == 4 * ["an emoji of a cat"]
    assert len(list((folder / "images").iterdir())) == 4 and "4 pictures, similarity " in capsys.readouterr().out
    shown = MaskBase(str(folder / "images.txt"), str(folder / "caption.txt"), size=32)
    assert len(shown) == 4 and shown.sample(0)["caption"].endswith("an emoji of a cat")
    with pytest.raises(InputError, match="images exists"):
        Program("class-pictures")(words)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"x")
    with pytest.raises(InputError, match="expected a .tar, a .parquet, or a folder"):
        list(read_index(tmp_path / "x.zip"))
    (tmp_path / "x.tar").write_bytes(b"x" * 2000)
    with pytest.raises(InputError, match="no readable tar"):
        list(read_index(tmp_path / "x.tar"))
