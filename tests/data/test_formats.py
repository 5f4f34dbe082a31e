"""Files as phones and programs write them: HEIC, AVIF, huge ones, long texts, animations; read-only folders."""

import logging
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from ldm.data import pictures
from ldm.data.folder import CaptionedFolder
from ldm.data.pictures import find_pictures, picture_size, read_picture
from ldm.errors import InputError


@pytest.fixture
def picture() -> Image.Image:
    """Red on the left, blue on the right, 64 x 32."""
    made = Image.new("RGB", (64, 32), "red")
    made.paste("blue", (32, 0, 64, 32))
    return made


def is_like(found: Image.Image, wanted: Image.Image) -> bool:
    apart = np.abs(np.asarray(found, int) - np.asarray(wanted, int))
    return found.size == wanted.size and found.mode == "RGB" and apart[:, :24].max() < 12 and apart[:, 40:].max() < 12


@pytest.mark.parametrize("ending", ["avif", "heic", "HEIF"])
def test_formats_of_phones(tmp_path, picture, ending):
    if ending != "avif":
        pytest.importorskip("pillow_heif").register_heif_opener()
    picture.save(tmp_path / f"a.{ending}", quality=95)
    assert find_pictures(tmp_path) == [tmp_path / f"a.{ending}"]
    assert is_like(read_picture(tmp_path / f"a.{ending}"), picture)
    assert picture_size(tmp_path / f"a.{ending}") == (32, 64)


def test_a_turned_heic_is_upright(tmp_path, picture):
    pytest.importorskip("pillow_heif").register_heif_opener()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.heic", exif=exif.tobytes(), quality=95)
    assert read_picture(tmp_path / "a.heic").size == (32, 64) == picture_size(tmp_path / "a.heic")[::-1]


def test_without_its_package_heic_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x1cftypheic")
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setattr(pictures, "_formats", lambda: ["JPEG", "PNG"])
    for read in (read_picture, picture_size.__wrapped__):
        with pytest.raises(InputError, match=r"HEIC needs pillow-heif: pip install 'position-adapters-ldm\[heif\]'"):
            read(tmp_path / "a.heic")


def test_200_megapixels_pass_and_300_are_refused(tmp_path):
    Image.new("L", (16384, 12288), 77).save(tmp_path / "a.png", compress_level=1)  # as phones say: 200 megapixels
    found = read_picture(tmp_path / "a.png").resize((8, 6), Image.Resampling.NEAREST)
    assert found.getpixel((3, 3)) == (77, 77, 77)
    for size in ((20000, 15000), (30000, 30000)):
        header = Image.new("1", (8, 8))
        header.save(tmp_path / "b.png")
        data = bytearray((tmp_path / "b.png").read_bytes())
        data[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        (tmp_path / "b.png").write_bytes(data)
        with pytest.raises(InputError, match="it has 20000 x 15000 pixels; make it smaller than|exceeds limit"):
            read_picture(tmp_path / "b.png")


def test_phones_pictures_need_no_copies():
    """An RGB picture of 200 megapixels stays below the limit, turned or not."""
    large = Image.new("RGB", (1, 1))
    large._size = (16384, 12288)
    pictures._check_size(large)
    large._size = (17000, 14000)
    with pytest.raises(InputError, match="it has 17000 x 14000 pixels; make it smaller than 14956 squared"):
        pictures._check_size(large)


def test_long_texts_in_png(tmp_path, picture):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    picture.save(tmp_path / "a.png", pnginfo=info)
    assert is_like(read_picture(tmp_path / "a.png"), picture)


@pytest.mark.parametrize("ending", ["gif", "png", "webp"])
def test_an_animation_shows_its_first_frame_and_says_so_once(tmp_path, picture, ending, caplog):
    more = [Image.new("RGB", (64, 32), "green")]
    picture.save(tmp_path / f"a.{ending}", save_all=True, append_images=more, lossless=True)
    with caplog.at_level(logging.WARNING):
        assert is_like(read_picture(tmp_path / f"a.{ending}"), picture)
        read_picture(tmp_path / f"a.{ending}")
    said = f"{tmp_path}: a.{ending} is animated: only the first frame is shown"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_nothing_is_written_beside_the_pictures(tmp_path, picture):
    picture.save(tmp_path / "a.png")
    tmp_path.chmod(0o555)
    try:
        data = CaptionedFolder(tmp_path, size=16, captions="filename", buckets=True)
        assert data.sample(0)["caption"] == "a"
        assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    finally:
        tmp_path.chmod(0o755)
