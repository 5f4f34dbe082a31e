"""Writes the webdataset that `ldm.data.captioned` reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from ldm.checkpoints import atomic_write


def write_records(path: str | Path, records: Iterable[tuple[dict, np.ndarray | bytes]]) -> int:
    """Write records with their pictures (uint8 [h, w, 3 or 4], or WebP) as `.tar` or `.tar.gz`; returns how many."""
    path = Path(path)
    count = 0
    with atomic_write(path) as unfinished:
        with tarfile.open(unfinished, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for record, picture in records:
                key = f"{count:06d}"
                _add(archive, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
                _add(archive, f"{key}.webp", picture if isinstance(picture, bytes) else lossless(picture))
                count += 1
    return count


def lossless(picture: np.ndarray) -> bytes:
    """A picture as WebP, in three quarters of the size as PNG."""
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "WEBP", lossless=True)
    return encoded.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
