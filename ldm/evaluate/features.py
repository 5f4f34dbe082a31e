"""Computes vectors of pictures in batches, with a cache by content, so each network sees a picture only once."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.data.pictures import read_picture
from ldm.errors import InputError
from ldm.evaluate.networks import Network
from ldm.writing import writing

FILE = "features.sqlite"
CHUNK = 256  # pictures in memory at once


def content_of(picture: Image.Image) -> str:
    """The SHA-256 of a picture's size and 8-bit RGB values, which is the same in memory and in a lossless file."""
    digest = hashlib.sha256(f"{picture.width}x{picture.height}:".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Vectors by (digest of the network, content of the picture), in memory and, with a folder, also in a file.

    Several processes may share the file: SQLite locks it, and rows are written atomically.
    Raises `InputError` for a file of another kind.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.known: dict[tuple[str, str], Tensor] = {}
        self.file = None if folder is None else Path(folder) / FILE
        if self.file is not None:
            with writing(self.file):
                self.file.parent.mkdir(parents=True, exist_ok=True)
            self._do("CREATE TABLE IF NOT EXISTS features (network TEXT, picture TEXT, vector BLOB, "
                     "PRIMARY KEY (network, picture))")  # fmt: skip

    def get(self, network: str, pictures: Sequence[str]) -> dict[str, Tensor]:
        """The known vectors by content."""
        absent = [picture for picture in dict.fromkeys(pictures) if (network, picture) not in self.known]
        for start in range(0, len(absent) if self.file else 0, 500):
            part = absent[start : start + 500]
            marks = ", ".join("?" * len(part))
            query = f"SELECT picture, vector FROM features WHERE network = ? AND picture IN ({marks})"
            for picture, blob in self._do(query, (network, *part)):
                vector = torch.from_numpy(np.frombuffer(blob, "<f4").copy())
                if len(vector) and torch.isfinite(vector).all():
                    self.known[network, picture] = vector
        return {p: self.known[network, p] for p in pictures if (network, p) in self.known}

    def put(self, network: str, vectors: dict[str, Tensor]) -> None:
        """Store vectors [d] by content."""
        self.known |= {(network, picture): vector for picture, vector in vectors.items()}
        if self.file is not None:
            rows = [(network, picture, vector.numpy().astype("<f4").tobytes()) for picture, vector in vectors.items()]
            self._do("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", many=rows)

    def _do(self, query: str, values: Sequence[str] = (), many: Sequence[tuple] | None = None) -> list[tuple]:
        try:
            with closing(sqlite3.connect(self.file, timeout=60)) as file, file:
                if many is not None:
                    file.executemany(query, many)
                    return []
                return file.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise InputError(
                f"the cache {self.file} cannot be used ({error}); remove it, or name another one"
            ) from None


def vectors_of(
    network: Network,
    pictures: Sequence[Image.Image],
    cache: FeatureCache,
    batch_size: int = 32,
    verbose: bool = False,
) -> Tensor:
    """The vectors [n, d] of RGB pictures; cached ones are not computed again."""
    found: list[Tensor] = []
    progress = tqdm(total=len(pictures), desc=network.name, disable=not verbose, leave=False)
    with progress:
        for start in range(0, len(pictures), CHUNK):
            part = [pictures[i] for i in range(start, min(start + CHUNK, len(pictures)))]
            contents = [content_of(picture) for picture in part]
            known = cache.get(network.digest, contents)
            new = {name: picture for name, picture in zip(contents, part, strict=True) if name not in known}
            names = list(new)
            for first in range(0, len(names), batch_size):
                batch = names[first : first + batch_size]
                seen = dict(zip(batch, network.vectors([new[name] for name in batch]), strict=True))
                cache.put(network.digest, seen)
                known |= seen
            found += [known[content] for content in contents]
            progress.update(len(part))
    return torch.stack(found)


class Files(Sequence):
    """The RGB pictures of files, which are read on access, so a large folder needs no memory."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Image.Image:
        return read_picture(self.paths[number])
