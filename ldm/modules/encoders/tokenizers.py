"""Finding a tokenizer's files: in local folders first, then through the hub client's cache, then from the hub."""

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
    """The folder of a text encoder, if its JSON asks for no code of its own. Raises `InputError`."""
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

    `shipped`: where no folder has the files, the vocabulary of CLIP that comes with this package is the right one.

    Raises `InputError`, which says which files to put where, if they are not to be had.
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
    """The tokenizer of class `kind` in transformers that lies in a folder. Raises `InputError` for a damaged one."""
    import transformers

    check_tokenizer(folder), refuse_code(folder)
    with building(folder), without_marks(folder) as place:
        return getattr(transformers, kind).from_pretrained(place)


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """A folder with a tokenizer's files, none of which begins with a byte order mark: this one, or a copy for a while.

    Editors of Windows put the mark there, and the library that reads the files takes it for a part of them.
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
    """The folder of the hub's cache that holds the files, fetched if need be; None if they are not to be had.

    Asked for by file, since transformers 5 makes up an empty tokenizer where there are no files.
    """
    from huggingface_hub import hf_hub_download

    for local_only in (True, False):
        try:
            return [Path(hf_hub_download(version, file, local_files_only=local_only)).parent for file in files][0]
        except Exception as error:  # the client raises a dozen kinds; all mean that the files are not to be had
            log.debug("%s: %s", version, error)
    return None
