"""Finding a tokenizer's files: in local folders first, then through the hub client's cache, then from the hub."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.config import find_file
from ldm.errors import InputError
from ldm.files import read_json
from ldm.modules.encoders.claims import check_tokenizer

log = logging.getLogger(__name__)


CONFIGURATIONS = ("config.json", "tokenizer_config.json")


def refuse_code(folder: Path) -> Path:
    """The folder of a text encoder, if its JSON asks for no code of its own. Raises `InputError`."""
    for name in CONFIGURATIONS:
        file = folder / name
        if not file.is_file():
            continue
        about = read_json(file)
        if isinstance(about, dict) and "auto_map" in about:
            raise InputError(f"{file} refused: its auto_map asks for code, and a folder is data; take that entry out")
    return folder


def load_tokenizer(kind: str, version: str, files: Sequence[str], folder: str | None = None) -> Any:
    """The tokenizer of class `kind` in transformers, for the model `version` (a folder or a name on the hub).

    Raises `InputError`, which says which files to put where, if they are not to be had.
    """
    import transformers

    folders = [folder, version, f"models/{Path(version).name}"]
    for place in (find_file(name) for name in folders if name):
        if all((place / file).is_file() for file in files):
            check_tokenizer(place)
            return getattr(transformers, kind).from_pretrained(refuse_code(place))
    if place := _from_hub(version, files):
        return getattr(transformers, kind).from_pretrained(refuse_code(place))
    raise InputError(
        f"no tokenizer for {version}: put its {' and '.join(files)} into {folders[-1]}, "
        "or name a folder that has them as model.params.cond_stage_config.params.tokenizer"
    )


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
