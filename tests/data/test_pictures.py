"""Every kind of picture file becomes upright RGB, and everything that cannot is refused in one line."""

import logging
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.class_images import missing_class_images
from ldm.data.pictures import INTERPOLATIONS, find_pictures, fit_square, read_picture, to_tensor
from ldm.errors import InputError
from tests.helpers import assert_close_to

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture
def corners() -> Image.Image:
    """6 wide and 4 high: red top left, green top right, blue bottom left, white bottom right."""
    picture = Image.new("RGB", (6, 4))
    for x, y, colour in ((0, 0, RED), (3, 0, GREEN), (0, 2, BLUE), (3, 2, WHITE)):
        picture.paste(colour, (x, y, x + 3, y + 2))
    return picture


def corner_colours(picture: Image.Image) -> list:
    w, h = picture.size
    return [picture.getpixel(place) for place in ((0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1))]


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The eight EXIF orientations: what has to be done to the upright picture to get the stored one.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_applied(tmp_path, corners, orientation):
    stored = corners if STORED[orientation] is None else corners.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path / "a.png")
    assert picture.size == (6, 4)
    assert corner_colours(picture) == [RED, GREEN, BLUE, WHITE]


def test_the_orientation_of_a_16_bit_picture_is_applied_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(np.array([[0, 65535]], dtype=np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert np.asarray(read_picture(tmp_path / "a.png"))[0, :, 0].tolist() == [255, 0]


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (2, 2), (255, 0, 0, 255)).save(tmp_path / "solid.png")
    Image.new("RGBA", (2, 2), (0, 0, 0, 128)).save(tmp_path / "half.png")
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "grey.png")
    Image.new("RGB", (2, 2), RED).save(tmp_path / "key.png", transparency=RED)
    pixel = {path.stem: read_picture(path).getpixel((0, 0)) for path in find_pictures(tmp_path)}
    assert pixel == {"clear": WHITE, "solid": RED, "half": (127, 127, 127), "grey": WHITE, "key": WHITE}


@pytest.mark.parametrize("extension", ["png", "gif"])
def test_palette_with_a_transparent_entry(tmp_path, extension):
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 0, *RED, *BLUE])
    picture.putdata([1, 2])
    picture.save(tmp_path / f"a.{extension}", transparency=1)
    assert np.asarray(read_picture(tmp_path / f"a.{extension}")).tolist() == [[list(WHITE), list(BLUE)]]


@pytest.mark.parametrize(
    "mode, colour, expected",
    [("L", 77, (77, 77, 77)), ("1", 1, WHITE), ("P", 0, (0, 0, 0)), ("LA", (77, 255), (77, 77, 77)), ("RGB", RED, RED)],
)
def test_plain_modes(tmp_path, mode, colour, expected):
    Image.new(mode, (3, 3), colour).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert picture.mode == "RGB" and picture.getpixel((1, 1)) == expected


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert_close_to(np.array(read_picture(tmp_path / "a.jpg"))[8, 8], np.array(RED), tol=0.02)


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path, extension):
    values = np.array([[0, 200, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{extension}")
    picture = read_picture(tmp_path / f"a.{extension}")
    assert np.asarray(picture)[0, :, 0].tolist() == [0, 1, 1, 128, 255]


def test_16_bit_values_in_a_32_bit_picture_are_scaled_and_larger_ones_refused(tmp_path):
    Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(tmp_path / "a.tif")
    assert np.asarray(read_picture(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 255]
    Image.fromarray(np.array([[0, 65536]], dtype=np.int32)).save(tmp_path / "b.tif")
    Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32)).save(tmp_path / "c.tif")
    for name in ("b.tif", "c.tif"):
        with pytest.raises(InputError, match=f"{name}.*32 bits") as caught:
            read_picture(tmp_path / name)
        one_line(caught)


def test_16_bit_rgb_png(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 65535, 32896, 0))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    assert read_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 128, 0)


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    for name in ("a.gif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert read_picture(tmp_path / name).getpixel((0, 0)) == RED


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch, corners):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    for kind in ("jpg", "png"):
        data = (tmp_path / f"whole.{kind}").read_bytes()
        (tmp_path / f"truncated.{kind}").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    damaged = bytearray((tmp_path / "whole.png").read_bytes())
    damaged[20:24] = b"\xff\xff\xff\xff"
    (tmp_path / "damaged.png").write_bytes(damaged)
    for name in ("truncated.jpg", "truncated.png", "text.jpg", "empty.png", "damaged.png", "absent.png"):
        with pytest.raises(InputError) as caught:
            read_picture(tmp_path / name)
        assert str(tmp_path / name) in one_line(caught) and "replace or remove" in one_line(caught)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match="whole.jpg.*exceeds limit"):
        read_picture(tmp_path / "whole.jpg")


def test_find_pictures_sorts_and_warns_once(tmp_path, corners, caplog):
    for name in ("b.JPG", "a.png", "c.TiFF", "d.webp", "e.gif", "f.bmp", "g.jpeg", ".hidden.png"):
        corners.save(tmp_path / name)
    for name in ("notes.txt", "x.json", "y.csv", "z"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    corners.save(tmp_path / "folder.png" / "inside.png")
    with caplog.at_level(logging.WARNING):
        found = find_pictures(str(tmp_path))
    assert [path.name for path in found] == ["a.png", "b.JPG", "c.TiFF", "d.webp", "e.gif", "f.bmp", "g.jpeg"]
    assert len(caplog.records) == 1
    assert "skipped 6" in caplog.text and ".hidden.png" in caplog.text and "..." in caplog.text
    caplog.clear()
    (tmp_path / "clean").mkdir()
    corners.save(tmp_path / "clean" / "a.png")
    find_pictures(tmp_path / "clean")
    assert not caplog.records


def test_folders_without_pictures_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    cases = {
        "absent": "does not exist",
        "empty": "is empty",
        "other": "has no pictures, only notes.txt",
        "other/notes.txt": "is a file",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            find_pictures(tmp_path / name)
        assert str(tmp_path / name) in one_line(caught) and "expected a folder with pictures (jpg," in one_line(caught)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_to_tensor_crops_the_centre_and_covers_the_range(interpolation):
    picture = Image.new("RGB", (40, 20), BLUE)
    picture.paste((255, 0, 128), (10, 0, 30, 20))
    image = to_tensor(picture, 8, interpolation)
    assert image.shape == (3, 8, 8) and image.dtype == torch.float32 and image.is_contiguous()
    expected = torch.tensor([1.0, -1.0, 128 / 127.5 - 1])[:, None, None].expand(3, 8, 8)
    assert_close_to(image, expected, 1e-6)
    squeezed = to_tensor(picture, 8, interpolation, center_crop=False)
    assert squeezed.shape == (3, 8, 8)
    assert_close_to(squeezed[:, :, 0], torch.tensor([-1.0, -1.0, 1.0])[:, None].expand(3, 8), 1e-6)


def test_resizing_is_antialiased():
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # one pixel white, one black: grey when seen from afar
    stripes = Image.fromarray(stripes)
    for interpolation in ("linear", "bilinear", "bicubic", "lanczos"):
        assert to_tensor(stripes, 32, interpolation)[:, :, 1:-1].abs().max() < 0.02
    assert to_tensor(stripes, 32, "nearest").abs().min() == 1


def test_interpolations_differ_but_for_synonyms(shared):
    picture = read_picture(shared / "data/dreambench/dog/00.jpg")
    squares = {name: fit_square(picture, 64, name) for name in INTERPOLATIONS}
    assert torch.equal(squares.pop("linear"), squares["bilinear"])
    for name, square in squares.items():
        assert all(name == other or not torch.equal(square, squares[other]) for other in squares)


def test_unknown_interpolation_is_refused():
    with pytest.raises(InputError, match="nearest, linear, bilinear, bicubic, lanczos, got 'cubic'"):
        to_tensor(Image.new("RGB", (4, 4)), 2, "cubic")


def test_missing_class_images_continues_and_counts_what_is_there(tmp_path, corners):
    folder = tmp_path / "class"
    assert missing_class_images(folder, 2) == ["00000.png", "00001.png"]
    folder.mkdir()
    assert missing_class_images(folder, 0) == []
    for name in ("00000.png", "00007.jpg", "mine.png"):
        corners.save(folder / name)
    (folder / "00009.txt").touch()
    assert missing_class_images(folder, 5) == ["00008.png", "00009.png"]
    corners.save(folder / "00008.png")  # the run is interrupted after the first
    assert missing_class_images(folder, 5) == ["00009.png"]
    assert missing_class_images(folder, 4) == [] == missing_class_images(folder, 1)
    with pytest.raises(InputError, match="must not be negative, got -1"):
        missing_class_images(folder, -1)
    with pytest.raises(InputError, match="is a file"):
        missing_class_images(folder / "mine.png", 1)
