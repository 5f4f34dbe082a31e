"""Floor 0: what the system refuses to write or to read, in a few words that name the path."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm.errors import InputError, WriteError, first_line

# How torch says that its writer in C++ failed; it does not tell why.
TORCH_WRITER = re.compile(
    r"inline_container|PytorchStreamWriter|basic_ios::clear|Parent directory .* does not exist|cannot be opened"
)


def printable(text: str) -> str:
    r"""Text that any UTF-8 file takes: bytes of a file name that are no UTF-8 become `\udce9` and the like."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def why(error: BaseException, folder: Path | None = None) -> str:
    """An error of reading or writing in a few words, such as `No space left on device`."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    number = getattr(error, "errno", None) or (int(found[1]) if found else None)
    if number:
        return os.strerror(number)
    if "null byte" in str(error) or "null character" in str(error):
        return "its name has a NUL character"
    if folder is not None and not has_space(folder):
        return os.strerror(errno.ENOSPC)
    if isinstance(error, RuntimeError) and TORCH_WRITER.search(str(error)):
        return "torch could not write all of it: is the disk full, or a quota or a limit on file sizes reached?"
    lines = [line for line in str(error).splitlines() if line.strip()]
    worker = "Original Traceback" in str(error)  # of a process that loads data: its last line is the error
    return lines[-1].strip() if worker else first_line(error)


def has_space(folder: Path) -> bool:
    """Whether a file system has room for more; True where it does not tell."""
    try:
        return shutil.disk_usage(folder).free > 1 << 16
    except (OSError, ValueError):
        return True


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within this context `path` is written: what the system refuses is told as a `WriteError` that names it."""
    was_there = _exists(path)
    try:
        yield
    except WriteError as error:
        hidden = f"{path.parent / f'.{path.name}.tmp-'}"  # see `ldm.checkpoints.atomic_write`
        if not str(error.path).startswith(hidden):
            raise
        raise WriteError(path, error.reason, was_there) from None
    except InputError:
        raise
    except Exception as error:
        if not _is_of_writing(error):
            raise
        reason = why(error, path.parent)
        named = getattr(error, "filename", None)
        if named and Path(os.fsdecode(named)) in path.parents:
            place = os.fsdecode(named)
            is_file = error.errno in (errno.EEXIST, errno.ENOTDIR)
            reason = f"{place} is a file, not a folder" if is_file else f"{reason}: {place}"
        raise WriteError(path, reason, was_there) from error


def _is_of_writing(error: Exception) -> bool:
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        return True
    if isinstance(error, ValueError):
        return "null byte" in str(error) or "null character" in str(error)
    return isinstance(error, RuntimeError) and TORCH_WRITER.search(str(error)) is not None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
