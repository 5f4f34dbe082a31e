"""The subjects of an evaluation: folders of pictures with `subject.json`."""

from __future__ import annotations

from pathlib import Path

from ldm.errors import InputError, first_line
from ldm.files import read_json


def class_word_of(subject: Path) -> str:
    """The class word of a subject. Raises `InputError` for a folder without `subject.json`."""
    try:
        return read_json(subject / "subject.json")["class_word"]
    except (InputError, LookupError, TypeError) as error:
        reason = first_line(error)
        raise InputError(f"{subject} is no subject, a folder with pictures and subject.json: {reason}") from None
