"""Whether a config, or an argument in one, is what its description says."""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from ldm.errors import InputError, did_you_mean, short
from ldm.schema.kinds import choices, phrase, sections_of
from ldm.schema.sections import DATA_TARGET, DEEPER, OWN_PREFIXES, UNUSED, Config


def check(config: Mapping[str, Any], source: str = "", data_target: str | None = None) -> None:
    """Refuse misspelt keys and wrong types of a config, or of a part of one; what is absent is nobody's mistake here.

    `config` is made of plain values; texts that refer to other keys (`${...}`) may stand for anything. `data_target`
    is the class that `data.target` means. Raises `InputError`: the dotted key, what was found, what was expected.
    """
    own = {key: value for key, value in config.items() if not is_own(key)}
    check_part(Config, own, "", source)
    for place, kind in DEEPER.items():
        if place != "data.params" or data_target == DATA_TARGET:
            check_part(kind, select(own, place), place, source)


def is_own(key: Any) -> bool:
    """Whether a key at the top level of a config is one of the user's own, which nothing checks."""
    return str(key).startswith(OWN_PREFIXES)


def check_part(kind: Any, value: Any, place: str = "", source: str = "") -> None:
    """Refuse what a value of that kind may not hold. `place` is its dotted key. Raises `InputError`."""
    value = _as_read(value)
    try:
        adapter(kind).validate_python(value)
    except ValidationError as refused:
        found = [(path_in(value, error["loc"]), error) for error in refused.errors(include_url=False)]
        found = [(path, error) for path, error in found if not _is_reference(error["input"])]
        paths = [path for path, _ in found]
        for path, error in found:
            if not any(path == other[: len(path)] and path != other for other in paths):  # another choice of a union
                prefix = f"{source}: " if source else ""
                raise InputError(prefix + _told(kind, path, error, place)) from None


@functools.cache
def adapter(kind: Any) -> TypeAdapter:
    """What checks values of that kind; it takes longer to make than to use."""
    return TypeAdapter(kind)


def _told(kind: Any, path: tuple, error: Any, place: str) -> str:
    dotted = ".".join([*([place] if place else []), *map(str, path)]).replace("--.", "--")
    if error["type"] == "extra_forbidden":
        known = [name for section in sections_of(at(kind, path[:-1])[0]) for name in section.model_fields]
        return f"{dotted} is unknown{did_you_mean(path[-1], known)}"
    annotation, metadata = at(kind, path)
    return f"{dotted or 'the config'} must be {phrase(annotation, metadata)}, got {short(error['input'])}"


def path_in(value: Any, location: Sequence[Any]) -> tuple:
    """The keys and indices among a location of pydantic, which also names the choices of unions."""
    path = []
    for piece in location:
        if isinstance(value, Mapping) and piece in value or isinstance(value, list) and isinstance(piece, int):
            path.append(piece)
            value = value[piece]
    return tuple(path)


def at(kind: Any, path: Sequence[Any]) -> tuple[Any, list]:
    """The annotation, and what bounds it, of the value at a path below one of that kind."""
    metadata: list = []
    for piece in path:
        below: tuple[Any, list] = (Any, [])
        for choice in choices(kind):
            if isinstance(choice, type) and issubclass(choice, BaseModel) and piece in choice.model_fields:
                field = choice.model_fields[piece]
                below = (field.annotation, field.metadata)
            elif get_origin(choice) in (list, dict):
                below = (get_args(choice)[-1], [])
        kind, metadata = below
    return kind, metadata


def select(config: Any, dotted: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for piece in dotted.split("."):
        config = config.get(piece) if isinstance(config, Mapping) else None
    return config


def _as_read(value: Any) -> Any:
    """Keys as text, and 3e3 as the whole number that it is."""
    if isinstance(value, Mapping):
        return {str(key): _as_read(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_read(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def unused(config: Mapping[str, Any], kind: Any = Config, place: str = "") -> Iterator[str]:
    """The dotted keys in a config that have no effect."""
    for section in sections_of(kind):
        for name, field in section.model_fields.items():
            if name not in config:
                continue
            dotted = f"{place}.{name}" if place else name
            if field.description == UNUSED and config[name] is not None:
                yield dotted
            elif isinstance(config[name], Mapping):
                yield from unused(config[name], field.annotation, dotted)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value of a config fits the annotation of a parameter; True where either is not of plain kinds."""
    if not _is_plain_kind(annotation) or not _is_plain(value) or _is_reference(value):
        return True
    try:
        as_json = json.dumps(_as_read(value), ensure_ascii=False)  # JSON's lists can be tuples
        adapter(annotation).validate_json(as_json.encode("utf-8", "replace"), strict=True)  # a file name may be bytes
    except ValidationError:
        return False
    return True


def _is_plain_kind(annotation: Any) -> bool:
    if get_origin(annotation) is Literal or annotation in (int, float, bool, str, None, type(None), Any, ...):
        return True
    if annotation in (list, tuple, dict, Sequence, Mapping):
        return True
    origin = get_origin(annotation)
    if origin in (list, tuple, dict, Sequence, Mapping, Union, types.UnionType):
        return all(map(_is_plain_kind, get_args(annotation)))
    return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, (str, int, float, bool)) and _is_plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, bool, str))
