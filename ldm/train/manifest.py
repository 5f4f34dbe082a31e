"""The manifest in a `last.ckpt`: a digest of every part, which reveals damage and edits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError

KEY = "manifest"


def manifest(content: Mapping[str, Any]) -> dict[str, Any]:
    """The shape, dtype and SHA-256 of each tensor by its path, and one SHA-256 of all that is not a tensor."""
    tensors: dict[str, Tensor] = {}
    rest = hashlib.sha256()
    for path, value in _leaves({key: part for key, part in content.items() if key != KEY}):
        if isinstance(value, Tensor):
            tensors[path] = value
        else:
            rest.update(f"{path}={value!r}\n".encode())
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashlib releases the GIL
        digests = list(pool.map(_digest, tensors.values()))
    listed = {
        path: {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": digest}
        for (path, tensor), digest in zip(tensors.items(), digests, strict=True)
    }
    return {"tensors": listed, "rest": rest.hexdigest()}


def check(content: Mapping[str, Any], source: str) -> None:
    """Raises `InputError` unless the content of a file agrees with its manifest."""
    listed = content[KEY]
    if not (isinstance(listed, Mapping) and isinstance(listed.get("tensors"), Mapping)):
        raise InputError(f"{source} is damaged: its manifest is no manifest; go on from another checkpoint")
    found = manifest(content)
    paths = sorted(listed["tensors"].keys() | found["tensors"].keys(), key=str)
    differing = [path for path in paths if listed["tensors"].get(path) != found["tensors"].get(path)]
    if differing:
        kind = "lacks" if differing[0] not in found["tensors"] else "differs from its manifest in"
        raise InputError(
            f"{source} is damaged or was edited: it {kind} {differing[0]}"
            + (f" and {len(differing) - 1} more tensors" if differing[1:] else "")
            + "; a resume would train something else"
        )
    if listed.get("rest") != found["rest"]:
        raise InputError(
            f"{source} is damaged or was edited: its counters, options or states are not those that were written; "
            "a resume would train something else"
        )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of nested containers by path; each container with its type and length."""
    if isinstance(value, Mapping):
        yield path, ("mapping", len(value))
        for key, part in value.items():
            yield from _leaves(part, f"{path}/{key}" if isinstance(key, str) else f"{path}/{key!r}")
    elif isinstance(value, (list, tuple)):
        yield path, ("list" if isinstance(value, list) else "tuple", len(value))
        for number, part in enumerate(value):
            yield from _leaves(part, f"{path}/{number}")
    else:
        yield path, value


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(plain.view(torch.uint8).numpy()).hexdigest()
