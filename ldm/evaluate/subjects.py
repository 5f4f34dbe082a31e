"""The subjects of an evaluation: folders of pictures with `subject.json`, as `ldm.data.build.subjects` writes them."""

from __future__ import annotations

import json
from pathlib import Path

from ldm.errors import explain
from ldm.files import read_text


def class_word_of(subject: Path) -> str:
    """What the subject is. Raises `InputError` for a folder that does not say."""
    wrong = (OSError, ValueError, LookupError, TypeError)
    with explain(f"{subject} is no subject, a folder with pictures and subject.json", *wrong):
        return json.loads(read_text(subject / "subject.json"))["class_word"]
