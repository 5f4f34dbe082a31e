"""Finds a tokenizer's files: first in local folders, then in the hub client's cache, then on the hub."""

from __future__ import annotations

import logging
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ldm.config import find_file
from ldm.errors import InputError
from ldm.files import read_json
from ldm.modules.encoders.claims import FILES, building, check_tokenizer
from ldm.modules.encoders.vocabulary import shipped_folder

log = logging.getLogger(__name__)


CONFIGURATIONS = ("config.json", "tokenizer_config.json")


def refuse_code(folder: Path) -> Path:
    """The folder of a text encoder. Raises `InputError` if its JSON asks for custom code."""
    for name in CONFIGURATIONS:
        file = folder / name
        if not file.is_file():
            continue
        config = read_json(file)
        if isinstance(config, dict) and "auto_map" in config:
            raise InputError(f"{file} refused: its auto_map asks for code, and a folder is data; take that entry out")
    return folder


def load_tokenizer(
    kind: str, version: str, files: Sequence[str], folder: str | None = None, shipped: bool = False
) -> Any:
    """The tokenizer of class `kind` in transformers, for the model `version` (a folder or a name on the hub).

    `shipped`: if no folder has the files, use CLIP's vocabulary of this package.

    If the files cannot be found, raises an `InputError` that says which files to put where.
    """
    folders = [folder, version, f"models/{Path(version).name}"]
    for place in (find_file(name) for name in folders if name):
        if all((place / file).is_file() for file in files):
            return read_tokenizer(kind, place)
    if shipped:
        with shipped_folder() as place:
            return read_tokenizer(kind, place)
    if place := _from_hub(version, files):
        return read_tokenizer(kind, place)
    raise InputError(
        f"no tokenizer for {version}: put its {' and '.join(files)} into {folders[-1]}, "
        "or name a folder that has them as model.params.cond_stage_config.params.tokenizer"
    )


def read_tokenizer(kind: str, folder: Path) -> Any:
    """The tokenizer of class `kind` in transformers from a folder. Raises `InputError` if it is damaged."""
    import transformers

    check_tokenizer(folder), refuse_code(folder)
    with building(folder), without_marks(folder) as place:
        return getattr(transformers, kind).from_pretrained(place)


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """Within this context: a folder with a tokenizer's files without byte order marks, the given one or a copy.

    Windows editors add the mark, and the library that reads the files treats it as content.
    """
    texts = {file.name: file.read_bytes() for name in (*FILES, "merges.txt") if (file := folder / name).is_file()}
    if not any(content.startswith(BOM_UTF8) for content in texts.values()):
        yield folder
        return
    with TemporaryDirectory() as copy:
        for name, content in texts.items():
            (Path(copy) / name).write_bytes(content.removeprefix(BOM_UTF8))
        yield Path(copy)


def _from_hub(version: str, files: Sequence[str]) -> Path | None:
    """The folder of the hub's cache with the files, which are downloaded if necessary; None if that fails.

    Files are requested one by one, because without files transformers 5 makes an empty tokenizer.
    """
    from huggingface_hub import hf_hub_download

    for local_only in (True, False):
        try:
            return [Path(hf_hub_download(version, file, local_files_only=local_only)).parent for file in files][0]
        except Exception as error:  # the client raises many types; all mean that the files are not available
            log.debug("%s: %s", version, error)
    return None
