"""The row of the folders that our own trainings write, see `own` and `own_kinds`."""

from __future__ import annotations

from ldm.interchange import own, own_kinds
from ldm.interchange.formats import Codec, Opened
from ldm.modules.folders import names_adapter


def is_folder(file: Opened) -> bool:
    """Whether a folder is one of these, or has position adapters of the published code."""
    folder = file.path
    published = folder.is_dir() and any(names_adapter(f"{inner.stem}.") for inner in folder.glob("*.pt"))
    return published or (folder / "adapter_config.json").is_file()


FOLDER = Codec(
    is_folder,
    {
        "adapters": lambda file, _: file.path,
        "lora": lambda file, _: own.lora(file.path),
        "kinds": lambda file, context: own_kinds.kinds(file.path, context),
        "delta": lambda file, _: own.delta(file.path),
        "words": lambda file, _: own.words(file.path),
    },
    file_in=own.latest,
)
