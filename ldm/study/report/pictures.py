"""The picture wall: what each config drew from the same prompt and seed, beside the photographs and the base's picture.

Pictures are embedded as WebP thumbnails until a limit of bytes is reached, one of each prompt and the first seeds
first, so that a small limit leaves a wall that is still whole. What was left out is said.

A table of results is data of any origin. Names of folders out of it must be plain names, and photographs are shown only
where their digest is the one that the table has: a table cannot have other pictures of this machine put into a page.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.config import find_file
from ldm.data.pictures import find_pictures, read_picture
from ldm.errors import InputError, first_line
from ldm.study.keys import pictures_digest
from ldm.study.report.facts import Facts, absent

NAME = re.compile(r"[\w-]{1,80}")
QUALITY = 88
PHOTOGRAPHS = 6  # of a subject


@dataclass
class Album:
    """Pictures as data URIs, each once, within a limit of bytes."""

    limit: int
    side: int  # pixels of the longer side
    uris: list[str] = field(default_factory=list)
    bytes: int = 0
    left_out: int = 0
    unreadable: list[str] = field(default_factory=list)
    known: dict[Path, int] = field(default_factory=dict)

    def add(self, path: Path) -> int | None:
        """The number of a picture; None where it cannot be read or has no room."""
        if path in self.known:
            return self.known[path]
        if self.left_out:  # what is more important has no room: nothing smaller takes it
            self.left_out += 1
            return None
        try:
            uri = thumbnail(read_picture(path), self.side)
        except InputError as error:
            self.unreadable.append(first_line(error))
            return None
        if self.bytes + len(uri) > self.limit:
            self.left_out += 1
            return None
        self.bytes += len(uri)
        self.uris.append(uri)
        self.known[path] = len(self.uris) - 1
        return self.known[path]


def thumbnail(picture: Image.Image, side: int) -> str:
    """A picture of at most `side` pixels as a data URI."""
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=QUALITY, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


@dataclass
class Wall:
    """The pictures of trials, ready to be shown.

    subjects: subject -> its photographs; trials: one for each trial, `{config, subject, seed, step, told, pictures}`
    with `pictures` of `{prompt, seed, drawn, base, told}`, where numbers are places in the album
    """

    album: Album
    subjects: dict[str, list[int]] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"subjects": self.subjects, "trials": self.trials, "uris": self.album.uris}

    def finish(self) -> None:
        """Say what is in the wall and what is not."""
        album = self.album
        size = f"{album.bytes / 2**20:.1f} MB"
        self.notes.append(f"{len(album.uris)} pictures of at most {album.side} pixels are embedded, {size}.")
        if album.left_out:
            self.notes.append(
                f"{album.left_out} more are left out: the limit is {album.limit / 2**20:g} MB (--max_mb)."
            )
        if album.unreadable:
            self.notes.append(f"{len(album.unreadable)} could not be read: {album.unreadable[0]}.")


def wall_of(facts: Facts, folder: Path, album: Album, photographs: str | None = None) -> Wall | None:
    """The wall of a sweep whose folder has `pictures/`; None where there are none."""
    if not (folder / "pictures").is_dir():
        return None
    wall = Wall(album)
    rows = facts.last.to_dict("records")
    for row in rows:
        subject = str(row["subject"])
        if subject not in wall.subjects:
            wall.subjects[subject] = _photographs(row, wall, photographs)
    places = {one.label: number for number, one in enumerate(facts.configs)}
    shown = [(_trial(facts, row), row) for row in rows]
    wanted = []  # (priority, trial, entry, paths)
    for trial, row in shown:
        told = dict(enumerate(_each(row)))
        repeats: Counter[str] = Counter()
        for number, path in enumerate(_drawn(folder, row)):
            entry = _entry(facts, number, told.get(number, {}))
            trial["pictures"].append(entry)
            priority = repeats[entry["prompt"]], trial["seed"], places[trial["config"]]
            repeats[entry["prompt"]] += 1
            wanted.append((priority, entry, path, _base(folder, row, number)))
    for _, entry, path, base in sorted(wanted, key=lambda one: one[0]):
        entry["drawn"] = album.add(path)
        entry["base"] = album.add(base) if base else None
    embedded = _embedded(trial for trial, _ in shown)
    wall.trials = sorted(embedded, key=lambda one: places[one["config"]])
    if not wall.trials:
        return None
    wall.finish()
    return wall


def _trial(facts: Facts, row: Mapping[str, Any]) -> dict[str, Any]:
    told = [(name, str(row[name])) for name in (*facts.settings, "subject", "seed", "step") if not absent(row[name])]
    told += [(name, f"{row[name]:.3f}") for name in facts.metrics if not absent(row[name])]
    step = row["step"]
    return {"config": str(row["config_label"]), "subject": str(row["subject"]), "seed": int(row["seed"]),
            "step": None if absent(step) else int(step), "told": told, "pictures": []}  # fmt: skip


def _embedded(trials: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trials that have pictures in the album, each with those alone."""
    found = []
    for trial in trials:
        trial["pictures"] = [entry for entry in trial["pictures"] if entry["drawn"] is not None]
        found += [trial] if trial["pictures"] else []
    return found


def _entry(facts: Facts, number: int, about: Mapping[str, Any]) -> dict[str, Any]:
    prompt = str(about.get("prompt") or f"picture {number + 1}")
    return {"prompt": prompt, "seed": about.get("seed"), "told": _scores(facts, about)}


def _scores(facts: Facts, about: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, f"{about[name]:.3f}") for name in facts.metrics if isinstance(about.get(name), float)]


def _drawn(folder: Path, row: Mapping[str, Any]) -> list[Path]:
    """The pictures of a row, in the order of their numbers."""
    key, step = str(row.get("key")), row.get("step")
    if not NAME.fullmatch(key) or absent(step):
        return []
    return sorted((folder / "pictures" / key / f"{int(step):06}").glob("[0-9]*.png"))


def _base(folder: Path, row: Mapping[str, Any], number: int) -> Path | None:
    """What the base drew from the same prompt and seed."""
    name = row.get("base_pictures")
    if absent(name) or not NAME.fullmatch(str(name)):
        return None
    path = folder / "pictures" / "base" / str(name) / f"{number:02}.png"
    return path if path.is_file() else None


def _each(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Prompt, seed and scores of each picture, as the table has them."""
    found = parsed(row.get("each"))
    return [one if isinstance(one, dict) else {} for one in found] if isinstance(found, list) else []


def _photographs(row: Mapping[str, Any], wall: Wall, elsewhere: str | None) -> list[int]:
    """The photographs of a row's subject, if they are the ones that it was trained on."""
    subject = str(row["subject"])
    config = parsed(row.get("config"))
    settings = config.get("dreambooth") if isinstance(config, dict) else None
    named = settings.get("data_root") if isinstance(settings, dict) else None
    candidates = [Path(elsewhere) / subject] if elsewhere and NAME.fullmatch(subject) else []
    candidates += [find_file(named)] if isinstance(named, str) else []
    for place in candidates:
        try:
            paths = find_pictures(place)
            digest = pictures_digest(place)
        except (InputError, OSError):
            continue
        if digest == row.get("subject_pictures"):
            return [number for path in paths[:PHOTOGRAPHS] if (number := wall.album.add(path)) is not None]
    wall.notes.append(
        f"The photographs of {subject} are not shown: they are not where they were, or have changed (--photographs)."
    )
    return []


def parsed(text: Any) -> Any:
    """What a cell with JSON says; None for another one."""
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None


def shown(paths: Sequence[Path], album: Album) -> list[int]:
    """The numbers of pictures in an album, without those that have no room."""
    return [number for path in paths if (number := album.add(path)) is not None]
