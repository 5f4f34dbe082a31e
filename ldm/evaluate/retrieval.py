"""Real pictures of a class, out of an index of captioned pictures, by their similarity to a prompt in CLIP's eyes.

Custom Diffusion's class pictures (arXiv 2212.04488, section 3.2) came from a service that searched LAION; here an index
is a file or folder on this machine: a WebDataset tar, a parquet table, or a folder of captioned pictures.
"""

from __future__ import annotations

import heapq
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from ldm.checkpoints import atomic_write, save_text
from ldm.data.captions import find_captions
from ldm.data.pictures import EXTENSIONS, decode_picture, find_pictures
from ldm.data.simple import bytes_of, read_table
from ldm.errors import InputError, explain
from ldm.evaluate.features import FeatureCache, content_of, vectors_of
from ldm.evaluate.networks import Network
from ldm.files import parse_json

MEMBER_BYTES = 2**28  # of a file in a tar
CHUNK = 64  # pictures that are looked at together
CAPTION = "caption"


@dataclass(frozen=True)
class Pair:
    """An encoded picture, its caption, and where it is from."""

    encoded: bytes
    caption: str
    source: str


@dataclass(frozen=True)
class Found:
    """A chosen picture with its similarity to the prompt."""

    similarity: float
    pair: Pair


# --- indexes


def read_index(path: str | Path, image_column: str = "image", text_column: str = "text") -> Iterator[Pair]:
    """The captioned pictures of an index: a `.tar`, a `.parquet`, or a folder of such files or of pictures.

    Raises `InputError`.
    """
    path = Path(path)
    if path.is_dir() and (files := sorted([*path.rglob("*.tar"), *path.rglob("*.parquet")])):
        for file in files:
            yield from read_index(file, image_column, text_column)
        return
    readers: dict[str, Callable[[], Iterator[Pair]]] = {
        ".tar": lambda: _tar(path), ".parquet": lambda: _parquet(path, image_column, text_column),
    }  # fmt: skip
    if not path.exists() or (path.is_file() and path.suffix not in readers):
        raise InputError(f"--index {path}: expected a .tar, a .parquet, or a folder of captioned pictures")
    yield from readers[path.suffix]() if path.is_file() else _folder(path)


def _folder(folder: Path) -> Iterator[Pair]:
    pictures = find_pictures(folder, (".txt", ".caption", ".jsonl", ".csv"))
    found, _ = find_captions(folder, tuple(picture.name for picture in pictures), "auto")
    for picture in pictures:
        if (texts := found.get(picture.name)) and texts[0].strip():
            yield Pair(picture.read_bytes(), texts[0], str(picture))


def _parquet(path: Path, image_column: str, text_column: str) -> Iterator[Pair]:
    pictures, captions = read_table([path], image_column, text_column)
    for number, caption in enumerate(captions):
        if not caption.strip():
            continue
        yield Pair(bytes_of(pictures[number].as_py(), number), caption, f"{path}, row {number}")


def _tar(path: Path) -> Iterator[Pair]:
    """The samples of a WebDataset: files in a row with the same name up to the first dot."""
    with explain(f"{path} is no readable tar", tarfile.TarError, EOFError, OSError):
        with tarfile.open(path, "r|*") as archive:
            key, held = None, {}
            for member in archive:
                stem, _, ending = member.name.rpartition("/")[2].partition(".")
                if (member.name.rpartition("/")[0], stem) != key:
                    yield from _sample(held, path)
                    key, held = (member.name.rpartition("/")[0], stem), {}
                if member.isfile() and member.size <= MEMBER_BYTES:
                    held[ending.lower()] = archive.extractfile(member).read()
            yield from _sample(held, path)


def _sample(held: dict[str, bytes], path: Path) -> Iterator[Pair]:
    picture = next((name for name in held if name.rpartition(".")[2] in EXTENSIONS), None)
    if picture is None or not held.keys() & {"txt", "json"}:
        return
    if "txt" in held:
        caption = held["txt"].decode("utf-8", "replace").strip()
    else:
        told = parse_json(held["json"].decode("utf-8", "replace"), f"{path}: a sample's json")
        caption = told.get(CAPTION) if isinstance(told, dict) else None
    if isinstance(caption, str) and caption.strip():
        yield Pair(held[picture], caption, str(path))


# --- the search


def nearest(
    pairs: Iterable[Pair], prompt: str, number: int, network: Network, cache: FeatureCache, by: str = "picture"
) -> list[Found]:
    """The pictures that are most similar to a prompt, the best first, each picture once.

    by: `picture` compares pictures with the prompt, `caption` their captions (as section 3.2 does)

    Pictures that cannot be decoded are passed over. Raises `InputError` for a network that reads no text.
    """
    if network.embed_captions is None:
        raise InputError(f"the network {network.name} reads no text; name a CLIP with --network")
    wanted = _embedded(network, [prompt])[0]
    best: list[tuple[float, int, Pair]] = []
    seen: set[str] = set()
    pairs, order = iter(pairs), 0
    while chunk := list(islice(pairs, CHUNK)):
        for similarity, pair in _compared(chunk, wanted, network, cache, by, seen):
            order -= 1  # of equals the first counts
            heapq.heappush(best, (similarity, order, pair))
            if len(best) > number:
                heapq.heappop(best)
    return [Found(similarity, pair) for similarity, _, pair in sorted(best, key=lambda one: one[:2], reverse=True)]


def _compared(
    chunk: Sequence[Pair], wanted: torch.Tensor, network: Network, cache: FeatureCache, by: str, seen: set[str]
) -> list[tuple[float, Pair]]:
    """The similarities of pairs whose pictures were not seen before."""
    fresh: list[tuple[Pair, Image.Image]] = []
    for pair in chunk:
        try:
            picture = decode_picture(pair.encoded, pair.source)
        except InputError:
            continue
        if (content := content_of(picture)) not in seen:
            seen.add(content)
            fresh.append((pair, picture))
    if not fresh:
        return []
    if by == CAPTION:
        vectors = _embedded(network, [pair.caption for pair, _ in fresh])
    else:
        vectors = F.normalize(vectors_of(network, [picture for _, picture in fresh], cache), dim=1)
    return list(zip((vectors @ wanted).tolist(), (pair for pair, _ in fresh), strict=True))


@torch.inference_mode()
def _embedded(network: Network, texts: Sequence[str]) -> torch.Tensor:
    return F.normalize(network.embed_captions(list(texts)).float().cpu(), dim=1)


def save(found: Sequence[Found], folder: Path) -> None:
    """Write images/00000.jpg, ..., images.txt and caption.txt (a line for each picture). Raises `InputError`."""
    with atomic_write(folder / "images") as beside:
        beside.mkdir()
        names = []
        for number, one in enumerate(found):
            picture = decode_picture(one.pair.encoded, one.pair.source)
            names.append(f"{number:05}.jpg")
            picture.save(beside / names[-1], quality=95)
    save_text(folder / "images.txt", "".join(f"{folder / 'images' / name}\n" for name in names))
    captions = [" ".join(one.pair.caption.split()) for one in found]
    save_text(folder / "caption.txt", "".join(f"{text}\n" for text in captions))
