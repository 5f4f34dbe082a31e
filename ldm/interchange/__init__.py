"""Reads and writes the files of other programs: LoRA, Custom Diffusion, learnt words, whole models.

`load_any` recognises a file by its content and puts it into a model. Every format (`formats.py`) is read into a neutral
form (`contents.py`: LoRA, delta, words, whole weights) and written from it; `docs/formats.md` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.errors import InputError
from ldm.interchange.formats import Context, Opened, by_name, open_file, recognise

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ldm.interchange.lora import Lora


def identify(path: str | Path | Opened) -> str:
    """The name of a file's or folder's format, see `formats.FORMATS`.

    Raises `InputError` for anything else, and for unsafe files.
    """
    return recognise(open_file(path)).name


def read_lora(path: str | Path | Opened, model: nn.Module, order: str | None = None) -> Lora:
    """A LoRA of any format, by the names of a model's layers. Raises `InputError`, also for another base model.

    `order` is one of `layers.ORDERS`. It matters only for formats without layer names, if the shapes do not decide it.
    """
    row = recognise(file := open_file(path))
    if "lora" not in row.holds:
        raise InputError(f"{file.given} is {row.title}; expected a LoRA")
    return row.read("lora", file, Context(model, order=order))


def load_any(
    model: nn.Module, path: str | Path, scale: float = 1.0, add: bool = False, words: Sequence[str] = ()
) -> None:
    """Put the content of a file or folder into a `LatentDiffusion`, at a strength.

    Changes are added to the weights; several files add up, each with its own scale. The change of a delta is relative
    to the weights before the first file. Words have no strength. With `add`, the position adapters of a folder are
    attached beside existing ones. `words` are other names for the words of a file.

    Raises `InputError` for a file that does not fit; then the model stays as it was.
    """
    from ldm.interchange.contents import CONTENTS, Loading

    row = recognise(file := open_file(path))
    form = CONTENTS[row.form]
    if form.load is None:
        raise InputError(f"{path} is {row.title}, not something to add to one; give it as the model's checkpoint")
    form.load(model, row.read(form.name, file, Context(model)), Loading(str(path), scale, add, words))


def assign_tokens(words: Sequence[str], paths: Sequence[str | Path]) -> list[list[str]]:
    """Distribute names over several LoRAs and deltas: each file, in order, gets as many names as it holds words.

    Our folders, and files of words, keep their own names. Raises `InputError` for too few or too many names.
    """
    from ldm.interchange.contents import CONTENTS

    held: list[Mapping[str, Tensor]] = []
    for path in paths:
        file = open_file(path) if words else None
        renamed = file and CONTENTS[recognise(file).form].renames_words
        held.append(words_in(file) if renamed else {})
    theirs = [word for some in held for word in some]
    if len(theirs) != len(words):
        raise InputError(
            f"{len(words)} words are named ({'+'.join(words)}), the LoRAs and deltas hold {len(theirs)}: "
            f"{'+'.join(theirs) or 'none'}"
        )
    names = iter(words)
    return [list(islice(names, len(some))) for some in held]


def words_in(path: str | Path | Opened, names: Sequence[str] = ()) -> Mapping[str, Tensor]:
    """The learnt words of a file or folder with their vectors [v, d]. `names`: for words without a name in the file."""
    row = recognise(file := open_file(path))
    return row.read("words", file, Context(words=names)) if "words" in row.holds else {}


__all__ = [
    "Context", "Opened", "assign_tokens", "by_name", "identify", "load_any", "open_file", "read_lora", "recognise",
    "words_in",
]  # fmt: skip
