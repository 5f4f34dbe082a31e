"""Finds picture files, reads all formats as RGB, and fits them into the square tensors of LDM."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor

from ldm.errors import InputError, first_line, short

log = logging.getLogger(__name__)

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "heic", "heif")
HEIF = (".heic", ".heif")  # which Pillow reads with the package pillow-heif

# Limits against pictures that are made to exhaust memory; one of 200 megapixels, as phones make, stays below.
BYTES = 5 * 2**28
BYTES_OF_PIXEL = {"1": 5, "L": 5, "P": 5, "RGB": 6, "YCbCr": 9, "LAB": 9, "CMYK": 11}  # with the copies of reading
MOST_BYTES_OF_PIXEL = 15  # of transparent and of 16-bit pictures
Image.MAX_IMAGE_PIXELS = BYTES // 5  # Pillow refuses twice as many, before our own limit can
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # programs store their whole workflow in one

# The formats that Pillow may use, whatever the file's name; none (such as EPS) for which it runs another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM", "ICO", "TGA")

LABEL = "-masklabel"  # OneTrainer's names of masks: dog-masklabel.png beside dog.jpg

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


EXPECTED = f"expected a folder with pictures ({', '.join(EXTENSIONS)})"


def is_picture(path: Path) -> bool:
    """True for a visible file with one of the `EXTENSIONS`, in any case."""
    return path.suffix[1:].lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()


def find_pictures(folder: str | Path, beside: Sequence[str] = ()) -> list[Path]:
    """The pictures in a folder, sorted by name, without sub-folders.

    Other files are skipped, with one warning that names a few; not those whose names end with one of `beside`. So are
    masks (`dog-masklabel.png` beside dog.jpg), unless `LABEL` is one of `beside`.
    Raises `InputError` if the folder does not exist, is not a folder, or has no pictures.
    """
    folder = Path(folder)
    entries = _entries(folder)
    pictures, masks = _without_masks(entries)
    entries = [path for path in entries if path not in masks or LABEL not in beside]
    if not pictures:
        found = f"has no pictures, only {some([path.name for path in entries])}" if entries else "is empty"
        raise InputError(f"the folder {folder} {found}: {EXPECTED}, directly in it; put some there or name another")
    taken = set(pictures)
    skipped = [path.name for path in entries if path not in taken and not path.name.endswith(tuple(beside))]
    if skipped:
        _warn_of_skipped(folder, tuple(skipped))
    return pictures


def _without_masks(entries: Sequence[Path]) -> tuple[list[Path], set[Path]]:
    """The pictures among the entries of a folder, and those that are masks of others."""
    pictures = [path for path in entries if is_picture(path)]
    stems = {path.stem for path in pictures}
    masks = {path for path in pictures if path.stem.endswith(LABEL) and path.stem.removesuffix(LABEL) in stems}
    return [path for path in pictures if path not in masks], masks


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name. Raises `InputError`."""
    if not folder.exists():
        raise InputError(f"the folder {folder} does not exist: {EXPECTED}; check the path")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file: {EXPECTED}; give the folder that it lies in")
    return sorted(folder.iterdir())


@cache
def _warn_of_skipped(folder: Path, names: tuple[str, ...]) -> None:
    """Warn once for each folder, even if several datasets read it."""
    log.warning("%s: skipped %d that are not pictures: %s", folder, len(names), some(names))


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def read_picture(path: str | Path) -> Image.Image:
    """A picture file as upright 8-bit RGB: EXIF orientation applied, transparency on white, only the first frame.

    Palette, grey, CMYK, 1-bit and 16-bit pictures are converted; 16-bit grey is scaled, not clipped.
    Raises `InputError`, naming the file, if it is missing, broken, cut off, or larger than Pillow's safety limit.
    """
    try:
        with Image.open(path, formats=_formats()) as picture:
            _check_size(picture)
            if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a phone's picture and its preview
                _tell_animated(Path(path).parent, Path(path).name)
                picture.seek(0)
            ImageOps.exif_transpose(picture, in_place=True)
            picture.load()
            return _rgb(picture)
    except Exception as error:  # Pillow's decoders raise many types for a damaged file
        raise InputError(f"cannot read the picture {path}: {_why(path, error)}") from error


def _why(path: str | Path, error: Exception) -> str:
    """Why a picture cannot be read, and what to do."""
    if Path(path).suffix.lower() in HEIF and "HEIF" not in Image.OPEN:
        return "HEIC needs pillow-heif: pip install 'position-adapters-ldm[heif]', or save it as JPEG"
    if Path(path).suffix.lower() == ".avif" and "AVIF" not in Image.OPEN:
        return "this Pillow has no AVIF: pip install 'pillow>=11.3', or save it as PNG"
    return f"{first_line(error)}; replace or remove it"


@cache
def _tell_animated(folder: Path, name: str) -> None:
    log.warning("%s: %s is animated: only the first frame is shown", folder, name)


def decode_picture(content: bytes, what: str) -> Image.Image:
    """The same for the bytes of a picture file. Raises `InputError`, which calls the picture `what`."""
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as picture:
            _check_size(picture)
            ImageOps.exif_transpose(picture, in_place=True)
            picture.load()
            return _rgb(picture)
    except Exception as error:  # see `read_picture`
        raise InputError(f"cannot read the picture {what}: {first_line(error)}; replace or remove it") from error


def read_alpha(path: str | Path, only_ask: bool = False) -> Image.Image | bool | None:
    """The upright alpha channel of a picture, 8-bit grey; None if it has none, or is opaque everywhere.

    `only_ask`: whether it has one, from the file's header. Raises `InputError` as `read_picture` does.
    """
    try:
        with Image.open(path, formats=_formats()) as picture:
            has_one = picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info
            if only_ask or not has_one:
                return has_one if only_ask else None
            _check_size(picture)
            alpha = ImageOps.exif_transpose(picture).convert("RGBA").getchannel("A")
            return alpha if alpha.getextrema()[0] < 255 else None
    except Exception as error:  # see `read_picture`
        raise InputError(f"cannot read the picture {path}: {_why(path, error)}") from error


@cache
def picture_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of an upright picture, from the file's header. Raises `InputError` as `read_picture` does."""
    try:
        with Image.open(path, formats=_formats()) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except Exception as error:  # see `read_picture`
        raise InputError(f"cannot read the picture {path}: {_why(path, error)}") from error
    return (width, height) if turned else (height, width)


@cache
def _formats() -> list[str]:
    """The `FORMATS` that this Pillow supports, and HEIC if pillow-heif is there."""
    Image.init()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener(thumbnails=False)
    return [name for name in FORMATS if name in Image.OPEN]


def _check_size(picture: Image.Image) -> None:
    """Before decoding, raises `InputError` for a picture that would take more than `BYTES` of memory."""
    width, height = picture.size
    mode = "RGBA" if "transparency" in picture.info else picture.mode
    each = BYTES_OF_PIXEL.get(mode, MOST_BYTES_OF_PIXEL)
    if width * height * each > BYTES:
        raise InputError(f"it has {width} x {height} pixels; make it smaller than {math.isqrt(BYTES // each)} squared")


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _grey_from_wide(picture)
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _grey_from_wide(picture: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey. Pillow's own `convert` would clip everything above 255 to white."""
    values = np.asarray(picture)
    if picture.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise InputError("its grey values have 32 bits, expected 8 or 16")
    grey = (values.astype(np.uint32) + 128) // 257  # 65535 = 255 * 257
    return Image.fromarray(grey.astype(np.uint8))


def fit_square(picture: Image.Image, size: int, interpolation: str = "bicubic", center_crop: bool = True) -> Tensor:
    """An RGB picture resized to a square, antialiased: uint8 [3, size, size].

    With `center_crop` the largest central square is kept; without it the whole picture is squeezed into the square.
    Pillow resizes, as in LDM, because it has all five `INTERPOLATIONS` and filters properly. kornia 0.9 blurs with a
    Gaussian and samples sparsely: for a photograph of 780 pixels it differs from Pillow's bicubic result by 41 dB PSNR
    at 64 pixels (blurred) and 46 dB at 512 (aliased), and it is slower.

    Raises `InputError` for an unknown interpolation.
    """
    if not center_crop:
        return resized(picture, (size, size), interpolation)
    width, height = picture.size
    return resized(picture, (size, size), interpolation, region(height, width, (size, size)))


Region = tuple[int, int, int, int]  # top, left, height, width in pixels


def region(
    height: int, width: int, shape: tuple[int, int], place: tuple[float, float] = (0.5, 0.5), zoom: float = 1.0
) -> Region:
    """The largest part of a picture with the aspect ratio of `shape` (h, w), or one that is `zoom` times smaller.

    `place`: how far down and to the right it lies, from 0 to 1; by default in the middle.
    """
    tall, wide = min(height, max(1, round(width * shape[0] / shape[1]))), width
    if tall == height:
        wide = min(width, max(1, round(height * shape[1] / shape[0])))
    tall, wide = max(1, round(tall / zoom)), max(1, round(wide / zoom))
    return int((height - tall) * place[0]), int((width - wide) * place[1]), tall, wide


def resized(
    picture: Image.Image, shape: tuple[int, int], interpolation: str = "bicubic", part: Region | None = None
) -> Tensor:
    """An RGB picture, or a part of it, resized to `shape` (h, w): uint8 [3, h, w]. Raises `InputError`."""
    if interpolation not in INTERPOLATIONS:
        raise InputError(f"interpolation: expected one of {', '.join(INTERPOLATIONS)}, got {short(interpolation)}")
    if part is not None:
        top, left, height, width = part
        picture = picture.crop((left, top, left + width, top + height))
    pixels = picture.resize(shape[::-1], INTERPOLATIONS[interpolation])
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous()  # h w c -> c h w


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [c, h, w] in 0..255 -> float32 [c, h, w] in [-1, 1]."""
    from kornia.enhance import normalize  # imported here because it takes a third of a second

    return normalize(pixels[None].float() / 255, mean=torch.tensor(0.5), std=torch.tensor(0.5))[0]


def to_tensor(picture: Image.Image, size: int, interpolation: str = "bicubic", center_crop: bool = True) -> Tensor:
    """An RGB picture as float32 [3, size, size] in [-1, 1], see `fit_square`. Raises `InputError`."""
    return normalize(fit_square(picture, size, interpolation, center_crop))
