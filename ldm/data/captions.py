"""Captions of the pictures in a folder: text files beside them, a table, their names, or the name of the folder."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ldm import schema
from ldm.data.pictures import some
from ldm.errors import InputError, first_line, short
from ldm.files import parse_json, read_text

log = logging.getLogger(__name__)

EXTENSIONS = (".txt", ".caption")
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # as in image folders of the `datasets` library
NAME, TEXT = "file_name", "text"
TABLE_BYTES = 2**28  # a million captions
REPEATS_AND_CAPTION = re.compile(r"(\d+)_(.+)")  # kohya's names of folders: 10_sks dog

Found = dict[str, tuple[str, ...]]  # captions by the name of the picture


def read_settings(captions: str | Mapping[str, Any] | None) -> schema.Captions:
    """The setting `captions` of a dataset, a source or a mapping, with its defaults. Raises `InputError`."""
    given = captions if captions is not None else "template"
    given = {"source": given} if isinstance(given, str) else given
    schema.check_part(schema.Captions, given, "captions")
    return schema.Captions(**given)


class Captions:
    """The captions of some pictures of one folder, and how they vary from draw to draw.

    `texts[n]` has the captions of picture n, and is empty where it has none.

    folder: of the pictures; paths: the pictures; settings: see `read_settings`. One line in the log says what was
    found. Captions without a picture are named. Raises `InputError` if the source that was chosen has no caption at
    all, and for a file that cannot be read.
    """

    def __init__(self, folder: str | Path, paths: Sequence[Path], settings: schema.Captions) -> None:
        self.settings = settings
        names = tuple(path.name for path in paths)
        found, source = find_captions(Path(folder), names, settings.source, tuple(extensions_of(settings)))
        self.texts = [found.get(name, ()) for name in names]
        if source is not None:
            _tell(Path(folder), names, tuple(self.texts), source)

    @property
    def vary(self) -> bool:
        """Whether a draw can have a caption that is not among `all_of`."""
        return self.settings.shuffle_tags or self.settings.tag_dropout > 0

    def draw(self, texts: Sequence[str], draws: torch.Generator | None) -> str:
        """One of `texts`, varied by random numbers from `draws`; without them the first one, as it is."""
        if draws is None:
            return self.framed(texts[0])
        which, dropped = torch.rand(2, generator=draws).tolist()
        if dropped < self.settings.dropout:
            return ""
        text = texts[int(which * len(texts))]
        return self.framed(self._with_other_tags(text, draws) if self.vary else text)

    def framed(self, text: str) -> str:
        """A caption with the prefix and the suffix."""
        parts = (self.settings.prefix, text, self.settings.suffix)
        return " ".join(part.strip() for part in parts if part.strip())

    def _with_other_tags(self, text: str, draws: torch.Generator) -> str:
        """The tags of a caption without those that are dropped, in another order; the first `keep_tags` stay."""
        tags = [tag.strip() for tag in text.split(self.settings.separator)]
        kept, free = tags[: self.settings.keep_tags], tags[self.settings.keep_tags :]
        chances = torch.rand(len(free), generator=draws).tolist()
        order = torch.randperm(len(free), generator=draws).tolist() if self.settings.shuffle_tags else range(len(free))
        free = [free[place] for place in order if chances[place] >= self.settings.tag_dropout]
        return f"{self.settings.separator.strip()} ".join(kept + free)


def extensions_of(settings: schema.Captions) -> list[str]:
    """The endings of caption files, each with its dot."""
    given = settings.ext or EXTENSIONS
    return [f".{one.lstrip('.')}" for one in ([given] if isinstance(given, str) else given)]


def find_captions(
    folder: Path, names: tuple[str, ...], source: str, extensions: tuple[str, ...] = EXTENSIONS
) -> tuple[Found, str | None]:
    """The captions of the pictures `names` in a folder, and where they are from (None: nowhere).

    `auto` takes the first source that has any: text files, a table, the name of the folder in kohya's form.
    Raises `InputError` if another source is chosen and has none.
    """
    if source == "template":
        return {}, None
    for name in ("txt", "metadata", "folder") if source == "auto" else (source,):
        found, said = READERS[name](folder, names, extensions)
        if found and not (source == "auto" and name == "folder" and kohya_name(folder) is None):
            return found, said
    if source != "auto":
        expected = {"txt": f"{names[0].rpartition('.')[0]}{extensions[0]} beside {names[0]}", "metadata": TABLES[0]}
        raise InputError(f"captions: {source} finds none in {folder}: expected {expected.get(source, 'names')}")
    return {}, None


def kohya_name(folder: Path) -> tuple[int, str] | None:
    """The repeats and the caption in the name of a folder such as `10_sks dog`; None for another name."""
    named = REPEATS_AND_CAPTION.fullmatch(Path(os.path.abspath(folder)).name)
    return (int(named[1]), named[2].strip()) if named and int(named[1]) > 0 else None


def caption_files(folder: Path, names: Sequence[str], extensions: Sequence[str] = EXTENSIONS) -> dict[str, str]:
    """The caption file of each picture that has one, by the picture's name: dog.txt or dog.png.txt for dog.png."""
    present = set(os.listdir(folder))
    found = {}
    for name in names:
        stem = name.rpartition(".")[0]
        likely = (f"{start}{extension}" for extension in extensions for start in (stem, name))
        if file := next((file for file in likely if file in present), None):
            found[name] = file
    return found


def _from_files(folder: Path, names: Sequence[str], extensions: Sequence[str]) -> tuple[Found, str]:
    files = caption_files(folder, names, extensions)
    _tell_alone(folder, _files_alone(folder, files, extensions))
    captions = {name: _lines(read_text(folder / file)) for name, file in files.items()}
    endings = dict.fromkeys(Path(file).suffix for file in files.values())
    return {name: lines for name, lines in captions.items() if lines}, " and ".join(endings)


def _files_alone(folder: Path, files: Mapping[str, str], extensions: Sequence[str]) -> tuple[str, ...]:
    """The caption files of a folder that are not among `files`."""
    used = set(files.values())
    return tuple(sorted(file for file in os.listdir(folder) if file.endswith(tuple(extensions)) and file not in used))


def _lines(text: str) -> tuple[str, ...]:
    """Every line that is not empty is one caption."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _from_table(folder: Path, names: Sequence[str], _: Sequence[str]) -> tuple[Found, str]:
    present = [table for table in TABLES if (folder / table).is_file()]
    if len(present) > 1:
        raise InputError(f"{folder} has {' and '.join(present)}: expected one table of captions; remove the others")
    found: dict[str, list[str]] = {}
    for table in present:
        for number, row in enumerate(ROWS[Path(table).suffix](folder / table), 1):
            name, captions = _cells(row, f"{folder / table}, row {number}")
            found.setdefault(name, []).extend(captions)
    _tell_alone(folder, tuple(sorted(found.keys() - set(names))))
    return {name: tuple(found[name]) for name in names if found.get(name)}, present[0] if present else ""


def _cells(row: Any, source: str) -> tuple[str, list[str]]:
    """The name of a picture and its captions, of which `text` has one or a list."""
    name, captions = (row.get(NAME), row.get(TEXT)) if isinstance(row, Mapping) else (None, None)
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(name, str) or not isinstance(captions, list) or not all(isinstance(one, str) for one in captions):
        raise InputError(f"{source}: expected {NAME} and {TEXT}, a caption or a list of them, got {short(row)}")
    return name, [caption.strip() for caption in captions if caption.strip()]


def _json_rows(path: Path) -> Iterator[Any]:
    for number, line in enumerate(read_text(path, TABLE_BYTES).splitlines(), 1):
        if line.strip():
            yield parse_json(line, f"{path}, line {number}")


def _csv_rows(path: Path) -> Iterator[Any]:
    yield from csv.DictReader(io.StringIO(read_text(path, TABLE_BYTES), newline=""))


def _parquet_rows(path: Path) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path} needs pyarrow: pip install 'position-adapters-ldm[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in (NAME, TEXT) if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}); expected a parquet file") from None


ROWS: dict[str, Callable[[Path], Iterator[Any]]] = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _from_names(folder: Path, names: Sequence[str], _: Sequence[str]) -> tuple[Found, str]:
    captions = {name: caption_in(name) for name in names}
    return {name: (caption,) for name, caption in captions.items() if caption}, "file names"


def caption_in(name: str) -> str:
    """The caption in a file name: `a_red_dog (2).png` and `a red dog-2.png` say "a red dog"."""
    stem = re.sub(r"[_\s]+", " ", name.rpartition(".")[0]).strip()
    return re.sub(r"(?<=\S)(\s*\(\d+\)|[\s-]+\d+)$", "", stem)


def _from_folder(folder: Path, names: Sequence[str], _: Sequence[str]) -> tuple[Found, str]:
    _, caption = kohya_name(folder) or (1, Path(os.path.abspath(folder)).name)
    return dict.fromkeys(names, (caption,)), f"the folder's name, {caption!r}"


READERS: dict[str, Callable[[Path, Sequence[str], Sequence[str]], tuple[Found, str]]] = {
    "txt": _from_files, "metadata": _from_table, "filename": _from_names, "folder": _from_folder,
}  # fmt: skip


# --- what is said, once for each folder, even if several datasets read it

@cache
def _tell(folder: Path, names: tuple[str, ...], texts: tuple[tuple[str, ...], ...], source: str) -> None:
    log.info("%s: %d pictures, %d captions from %s", folder, len(names), sum(map(len, texts)), source)
    if lacking := [name for name, own in zip(names, texts, strict=True) if not own]:
        log.warning("%s: %d pictures without a caption: %s", folder, len(lacking), some(lacking))


@cache
def _tell_alone(folder: Path, names: tuple[str, ...]) -> None:
    if names:
        log.warning("%s: %d captions without a picture: %s", folder, len(names), some(names))


@cache
def tell_unread(folder: Path, names: tuple[str, ...], option: str) -> None:
    """Say that a folder has captions that are not read, and that `option` reads them; and which have no picture."""
    files = caption_files(folder, names)
    _tell_alone(folder, _files_alone(folder, files, EXTENSIONS))
    found = [f"{len(files)} caption files"] * bool(files) + [table for table in TABLES if (folder / table).is_file()]
    if found:
        log.warning(
            "%s has %s, which are not read: captions are made from the template; %s reads them",
            folder, " and ".join(found), option,
        )  # fmt: skip
