"""The two formats of torch files: a zip file since torch 1.6, five pickles before."""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from ldm.errors import InputError, first_line, short
from ldm.pickles.assembly import Assembly
from ldm.pickles.machine import Machine

PICKLE_BYTES = 2**26  # a checkpoint of Stable Diffusion has 0.3 MB of pickle
DIRECTORY_BYTES = 2**23  # of a zip file: some 80,000 tensors
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how files of before torch 1.6 begin


def read(path: str | Path) -> Any:
    """The content of a torch file: memory-mapped tensors, dicts, lists, tuples, sets and plain values.

    Attributes of dicts (`_metadata` of state dicts) are left out, parameters become plain tensors, numpy numbers become
    Python numbers, devices become their names. Raises `InputError` for damaged files, files that ask for code, tensors
    that are not dense (sparse, quantized, ...), and files that claim more than they hold.
    """
    path = Path(path)
    try:
        with _Bounded(path) as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # writing to a tensor leaves the file alone
            read_format = _read_zip if mapped[:2] == b"PK" else _read_old
            return read_format(file, mapped, str(path))
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        if "not a zip file" in str(error):
            raise InputError(
                f"{path} is truncated: its table of contents is missing; download or save it again"
            ) from None
        raise _damaged(path, error) from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, EOFError, struct.error,
            NotImplementedError, RecursionError, RuntimeError) as error:  # fmt: skip
        raise _damaged(path, error) from None


def _damaged(path: str | Path, reason: Any) -> InputError:
    reason = first_line(reason) if isinstance(reason, BaseException) else reason
    return InputError(f"{path} is truncated or damaged ({reason}); download or save it again")


class _Bounded(io.FileIO):
    """A file with a limit for single reads: the largest size of a zip file's table of contents."""

    def read(self, size: int = -1) -> bytes:
        if size > DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its table of contents claims {size} bytes")
        return super().read(size)


def _read_zip(file: io.FileIO, mapped: mmap.mmap, source: str) -> Any:
    entries = _entries(file, mapped, source)
    roots = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise InputError(f"{source} is a zip file, but not one that torch.save wrote: it has no data.pkl")
    start, size, checksum = entries[f"{roots[0]}data.pkl"]
    if size > PICKLE_BYTES:
        raise InputError(f"{source} refused: its data.pkl has {size} bytes; expected at most {PICKLE_BYTES}")
    data = mapped[start : start + size]
    if zlib.crc32(data) != checksum:
        raise _damaged(source, "the checksum of data.pkl is wrong")
    machine = Machine(source)
    content, _ = machine.run(data)
    order, length, _ = entries.get(f"{roots[0]}byteorder", (0, 0, 0))
    places = {}
    for key, storage in machine.storages.items():
        if (name := f"{roots[0]}data/{key}") not in entries:
            raise _damaged(source, f"{name} is missing")
        start, size, _ = entries[name]
        if size != storage.nbytes:
            raise _damaged(source, f"{name} has {size} bytes, its tensors need {storage.nbytes}")
        places[key] = start
    return Assembly(mapped, places, mapped[order : order + min(length, 8)] == b"big", source).finished(content)


def _entries(file: io.FileIO, mapped: mmap.mmap, source: str) -> dict[str, tuple[int, int, int]]:
    """Name -> (start, bytes, checksum) of the files in a zip file. They must be uncompressed and must not overlap."""
    with zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    entries: dict[str, tuple[int, int, int]] = {}
    end = 0
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
            raise InputError(f"{source} refused: {short(info.filename)} in it is compressed, which torch never does")
        head = info.header_offset
        if info.filename in entries or head < end or mapped[head : head + 4] != b"PK\3\4":
            raise _damaged(source, f"{short(info.filename)} in it overlaps another entry")
        start = head + 30 + sum(struct.unpack_from("<HH", mapped, head + 26))  # after its name and extra fields
        end = start + info.file_size
        if end > len(mapped):
            raise _damaged(source, f"{short(info.filename)} in it is cut off")
        entries[info.filename] = start, info.file_size, info.CRC
    return entries


def _read_old(_: io.FileIO, mapped: mmap.mmap, source: str) -> Any:
    """Read five pickles, then the storages in the order of the fifth: number of elements and bytes of each."""
    position = 0
    machine = Machine(source)
    found = []
    for number in range(5):
        value, used = machine.run(mapped[position : position + PICKLE_BYTES])
        position += used
        found.append(value)
        if number == 0 and value != MAGIC or number == 1 and value != PROTOCOL:
            raise InputError(f"{source} is a pickle, but not one that torch.save wrote; expected weights")
    _, _, system, content, keys = found
    if not isinstance(keys, list) or set(keys) != set(machine.storages):
        raise _damaged(source, "its list of storages is wrong")
    places = {}
    for key in keys:
        storage = machine.storages[key]
        if mapped[position : position + 8] != struct.pack("<q", storage.elements):
            raise _damaged(source, f"storage {short(key)} has not the size that its tensors need")
        places[key] = position + 8
        position += 8 + storage.nbytes
        if position > len(mapped):
            raise _damaged(source, f"storage {short(key)} is cut off")
    is_big = isinstance(system, dict) and system.get("little_endian") is False
    return Assembly(mapped, places, is_big, source).finished(content)
