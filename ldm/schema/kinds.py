"""Types of the annotations in `sections`: their parts, and their names in plain English."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
BOUNDS = ("ge", "gt", "lt", "allow_inf_nan")


def choices(kind: Any) -> list[Any]:
    """The members of a union; of anything else, itself."""
    return list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]


def sections_of(kind: Any) -> list[type[BaseModel]]:
    return [choice for choice in choices(kind) if isinstance(choice, type) and issubclass(choice, BaseModel)]


def phrase(kind: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in words, as in `batch_size must be a whole number of at least 1`."""
    if get_origin(kind) is Annotated:
        return phrase(get_args(kind)[0], [*metadata, *get_args(kind)[1:]])
    if len(parts := [part for part in choices(kind) if part is not type(None)]) > 1 or parts[0] is not kind:
        return " or ".join(dict.fromkeys(phrase(part, metadata) for part in parts))
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return "a list"
    if dict in (kind, get_origin(kind)) or sections_of(kind):
        return "a mapping"
    return _bounded(kind, _bounds(metadata))


def _bounds(metadata: Sequence[Any]) -> dict[str, Any]:
    """The bounds among the metadata of an annotation, by pydantic's names for them."""
    holders = [holder for one in metadata for holder in (one, *getattr(one, "metadata", ()))]
    return {
        name: value for holder in holders for name in BOUNDS if (value := getattr(holder, name, None)) is not None
    }


def _bounded(kind: Any, bounds: dict[str, Any]) -> str:
    word = WORDS.get(kind, "a value")
    if kind is float and bounds.get("gt") == 0:
        return "a positive number"
    if kind is float and bounds.get("allow_inf_nan") is False:
        word = "a finite number"
    if "lt" in bounds:
        return f"{word} from {bounds['ge']} to {bounds['lt'] - 1}"
    return f"{word} of at least {bounds['ge']}" if "ge" in bounds else word
