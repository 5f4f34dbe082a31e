"""Floor 0: every read and write of weights.

Weights are untrusted: nothing is ever unpickled (`ldm.pickles` reads torch files), and a file cannot claim more memory
than it holds. Files are memory-mapped.
Writes are atomic: files and folders are written beside their place and renamed.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import pickles
from ldm.errors import InputError, first_line, short
from ldm.writing import printable, writing

log = logging.getLogger(__name__)

HEADER_BYTES = 2**24  # of a safetensors file: names and shapes of some 150,000 tensors
EMPTY_SIZE = 2**20  # largest product of the sizes of an empty tensor that are not 0


# --- reading --------------------------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, memory-mapped where the format allows.

    Reads `.safetensors` and torch files, which it recognises by content, with or without a `state_dict` level. Raises
    `InputError` for other files.
    """
    return weights_in(read_object(path), path)


def weights_in(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The tensors in the content of a checkpoint, with or without a `state_dict` level. Raises `InputError`."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not weights by name")
    weights = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise InputError(f"{path} holds no tensors; its keys are {short(list(content)[:5])}")
    return weights


def read_object(path: str | Path) -> Any:
    """The content of a `.safetensors` or torch file: tensors, containers and plain values, never code.

    Raises `InputError` for a missing, empty, truncated or foreign file and for a pickle that asks for code.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected a .ckpt, .pt or .safetensors file")
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise InputError(f"{path} is empty; download it again")
    if head[8:9] == b"{":  # must be the first check, because the eight bytes of the length may be anything
        return _read_safetensors(path)
    if head.lstrip().startswith(b"<"):
        raise InputError(f"{path} is a web page, not a checkpoint: the download went wrong (a login or licence page?)")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer, not the checkpoint itself; run 'git lfs pull'")
    if head.startswith(b"PK") or head[0] == 0x80:
        return pickles.read(path)
    raise InputError(f"{path} is neither a safetensors nor a torch file (it begins with {head[:8]!r})")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a `.safetensors` file; {} for others."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if HEADER_BYTES < header <= path.stat().st_size:
        raise InputError(f"{path} refused: its header has {header} bytes; expected at most {HEADER_BYTES}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise InputError(f"{path} is truncated or damaged ({first_line(error)}); download or save it again") from None
    for name, value in tensors.items():
        if not value.numel() and math.prod(size or 1 for size in value.shape) > EMPTY_SIZE:
            raise InputError(f"{path} refused: {short(name)} is empty, with the shape {short(list(value.shape))}")
    return tensors


@contextmanager
def open_folder(path: Path) -> Iterator[tuple[Path, Callable[[], bool]]]:
    """Yields a path that keeps pointing to this folder if another one replaces it, and a check whether it was replaced.

    Only Linux has such paths. Elsewhere it is the folder's own path, and only the check reveals a replacement.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    except OSError:  # Windows cannot open folders
        number = None
    try:
        opened = os.stat(path if number is None else number)
        pinned = Path(f"/proc/self/fd/{number}")

        def is_current() -> bool:
            try:
                now = os.stat(path)
            except OSError:
                return False
            return (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)

        yield pinned if number is not None and pinned.is_dir() else path, is_current
    finally:
        if number is not None:
            os.close(number)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def refuse_not_finite(tensors: Mapping[str, Tensor], source: str, advice: str = "get an undamaged copy") -> None:
    """Raises `InputError`, with the first name, if a value is infinite or not a number. One pass over the data."""
    bad = [name for name, value in tensors.items() if not is_finite(value)]
    if bad:
        raise InputError(f"{source}: {len(bad)} of {len(tensors)} tensors are not finite, e.g. {bad[0]}; {advice}")


def is_finite(value: Tensor) -> bool:
    """Whether a tensor has neither infinities nor NaN."""
    if not (value.is_floating_point() or value.is_complex()) or not value.numel() or value.is_meta:
        return True
    value = torch.view_as_real(value) if value.is_complex() else value
    value = value.float() if value.element_size() == 1 else value
    return all(bool(torch.isfinite(end)) for end in torch.aminmax(value.detach()))  # no copy, unlike isfinite(value)


# --- writing --------------------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path: str | Path, new: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` for a file or a folder, and renames it to `path` when the block succeeds.

    `path` always holds either its old content or the whole new content. One exception: systems that cannot exchange two
    folders (Linux can) need two steps, and a process that is killed between them leaves both in the hidden folder
    beside. A `new` file never replaces another one, even if several processes write at the same time. Raises
    `InputError` if a file would replace a folder, and `WriteError` if the system refuses.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.tmp-", dir=path.parent))
        with _in_place(path, holder, _put_new if new else os.replace):
            yield holder / path.name


def write_all(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Call `writers` with paths beside their targets, and rename all files after the last one has written.

    Raises `WriteError` if one of them cannot write; then nothing has changed.
    """
    with ExitStack() as stack:
        for path, write in writers.items():
            write(stack.enter_context(atomic_write(path)))


@contextmanager
def _in_place(path: Path, holder: Path, put: Callable[[Path, Path], None]) -> Iterator[None]:
    """Within this context, write to `holder`. Afterwards it is at `path`; after an error, the old content is."""
    old = holder / f"{path.name}.old"
    try:
        yield
        _flush(holder / path.name)
        if path.is_dir():
            if not (holder / path.name).is_dir():
                raise InputError(f"{path} is a folder: expected the name of a file to write")
            if _exchanged(holder / path.name, path):
                return  # the old content is deleted with the holder
            os.replace(path, old)
        put(holder / path.name, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(holder, ignore_errors=True)


def _put_new(file: Path, path: Path) -> None:
    """Move a file to a new name. Raises `FileExistsError` if the name exists."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: create an empty file first, then replace it
        path.open("xb").close()
        os.replace(file, path)


def _exchanged(one: Path, two: Path) -> bool:
    """Exchange two paths in one step. Returns False if the system or the file system cannot.

    This keeps the promise of `atomic_write`. Two renames would have a moment without anything at `two`, and a process
    that is killed in that moment would leave neither the old nor the new folder there. Python has no function for it.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if platform.system() == "Linux" else None
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2 is not None and not renameat2(here, os.fsencode(one), here, os.fsencode(two), exchange)


def _flush(path: Path) -> None:
    """Make sure that the content is on the disk before it gets its name."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def save_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors by name as one safetensors file, atomically. `metadata` maps strings to strings."""
    from safetensors.torch import save_file

    with atomic_write(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode  # safetensors makes files that only their owner can read
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, beside, dict(metadata or {}))
        beside.chmod(mode)
        if metadata and len(metadata) > 1:
            _sort_metadata(beside)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file by name, in place: safetensors writes it in an order of chance."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def save_torch(path: str | Path, content: Any) -> None:
    """Write a torch file, atomically."""
    with atomic_write(path) as beside:
        torch.save(content, beside)


def save_json(path: str | Path, content: Any) -> None:
    """Write indented JSON, atomically."""
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8, atomically."""
    with atomic_write(path) as beside:
        beside.write_text(printable(text), encoding="utf-8")


# --- a digest of weights ---------------------------------------------------------------------------------------------


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short digest that distinguishes base models: names, shapes and eight values of each tensor, rounded to fp16.

    It reads very little of a memory-mapped checkpoint, and is the same for fp16 and fp32 copies.
    """
    names = sorted(tensors)
    flat = [tensors[name].detach().flatten() for name in names]
    picked = [values[:: max(1, len(values) // 8)][:8].half() for values in flat]
    digest = hashlib.sha256(json.dumps([(name, list(tensors[name].shape)) for name in names]).encode())
    digest.update(torch.cat(picked).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
