"""Floor 0: reads text, JSON and YAML of any origin within limits.

Size, depth and the expansion of aliases are checked before a file is parsed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ldm.errors import InputError, first_line, short
from ldm.writing import why

TEXT_BYTES, YAML_BYTES = 2**24, 2**18  # the largest valid JSON, a vocabulary of 1,000,000 words, has 14 MB
DEPTH = 64
YAML_VALUES = 100_000  # with expanded aliases


def read_text(path: str | Path, limit: int = TEXT_BYTES) -> str:
    """The content of a text file in UTF-8, whatever the locale, without the byte order mark of Windows editors.

    Raises `InputError` if it cannot be read, is larger than `limit` bytes or has another encoding.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise InputError(f"{path} refused: it has more than {limit} bytes")
        return data.decode("utf-8-sig")
    except InputError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path} cannot be read ({error.reason} at byte {error.start}); expected UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({why(error)}); expected text in UTF-8") from None


def read_json(path: str | Path, limit: int = TEXT_BYTES) -> Any:
    """The JSON in a file. Raises `InputError`, see `read_text` and `parse_json`."""
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str, source: str, limit: int = TEXT_BYTES) -> Any:
    """JSON as Python values. Raises `InputError` if it is invalid, too long, or nested too deeply."""
    if not isinstance(text, str) or len(text) > limit:
        raise InputError(f"{source} refused: expected at most {limit} characters of JSON, got {short(text)}")
    try:
        value = json.loads(text)
    except RecursionError:
        raise InputError(f"{source} refused: its JSON is nested more than {DEPTH} deep") from None
    except ValueError as error:
        raise InputError(f"{source} is damaged: no valid JSON ({first_line(error)})") from None
    layer = [value]
    for _ in range(DEPTH):
        layer = [
            part
            for whole in layer
            if isinstance(whole, (dict, list))
            for part in (whole.values() if isinstance(whole, dict) else whole)
        ]
        if not layer:
            return value
    raise InputError(f"{source} refused: its JSON is nested more than {DEPTH} deep")


def read_yaml_text(path: str | Path) -> str:
    """The text of a YAML file, if its aliases do not expand too far: they may double the size with every line.

    Invalid YAML is left to the parser. Raises `InputError`.
    """
    text = read_text(path, YAML_BYTES)
    check_yaml(text, str(path))
    return text


def check_yaml(text: str, source: str) -> None:
    """Raises `InputError` for YAML that is nested too deeply or has too many values, with expanded aliases."""
    import yaml

    counts = [0]  # values in the open collections, the outermost first
    anchors: dict[str, int] = {}  # the number of values of each
    opened: list[str | None] = []
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            match event:
                case yaml.AliasEvent() if event.anchor in opened:
                    raise InputError(f"{source} refused: its YAML contains itself (*{event.anchor})")
                case yaml.AliasEvent():
                    counts[-1] += anchors.get(event.anchor, 1)
                case yaml.ScalarEvent():
                    counts[-1] += 1
                    anchors[event.anchor or ""] = 1
                case yaml.CollectionStartEvent():
                    opened.append(event.anchor)
                    counts.append(1)
                case yaml.CollectionEndEvent():
                    count, anchor = counts.pop(), opened.pop()
                    counts[-1] += count
                    anchors[anchor or ""] = count
            if len(counts) > DEPTH or counts[-1] > YAML_VALUES:
                raise InputError(
                    f"{source} refused: its YAML is nested more than {DEPTH} deep or unfolds to more than "
                    f"{YAML_VALUES} values"
                )
    except yaml.YAMLError:
        return
