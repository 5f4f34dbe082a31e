"""Floor 0: torch files (`torch.save`, of today and of before 1.6) as tensors and plain values, without unpickling.

A pickle is a program for a stack machine. `pickletools.genops` takes it apart, and the machine here knows only what
weights need: it makes containers, numbers and texts, and what it would "call" are the functions of `BUILDERS`, which
are ours and do nothing else. No name is looked up in any module, nothing is imported, and numpy and torch do not take
part before all claims are checked: that a storage is in the file, and that a tensor lies within its storage.

`torch.load(weights_only=True)` is not enough for files of strangers. Its own list of allowed functions, which nobody
can shorten, holds those for sparse, quantized, nested and meta tensors; it allocates what a file merely claims; and it
lets tensors be larger than their storages.

The formats: https://docs.pytorch.org/docs/stable/notes/serialization.html and `torch/serialization.py`.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.errors import InputError, first_line, short

# What a file may hold beside its tensors. A checkpoint of Stable Diffusion has 0.3 MB of pickle with 60,000 operations.
PICKLE_BYTES, OPERATIONS, DEPTH, VALUES = 2**26, 2_000_000, 64, 4_000_000
DIRECTORY_BYTES = 2**23  # of a zip file: some 80,000 tensors
DIMENSIONS = 16
EXPANDED = 2**20  # bytes that a tensor may have beyond its storage, by strides of 0
SHARED = 8  # how often, on average, tensors may share the bytes of a file

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how files of before torch 1.6 begin

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# numpy's numbers, by numpy's name for their type: the letter for `struct`
NUMPY = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"} | {f"{k}{n}": c for k, cs in (("i", "bhiq"), ("u", "BHIQ"))
                                                       for n, c in zip((1, 2, 4, 8), cs, strict=True)}  # fmt: skip
SCALARS = (str, bytes, int, float, bool, type(None))


def read(path: str | Path) -> Any:
    """What a torch file holds: tensors that are mapped into memory, dicts, lists, tuples, sets and plain values.

    Attributes of dicts (`_metadata` of state dicts) are left out, parameters are plain tensors, numpy numbers are
    Python's, a device is its name. Raises `InputError` for a damaged file, for one that asks for code, for tensors
    that are not dense (sparse, quantized, ...), and for one that claims more than it holds.
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
    """A file that hands out no more at once than the table of contents of a zip file may have."""

    def read(self, size: int = -1) -> bytes:
        if size > DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its table of contents claims {size} bytes")
        return super().read(size)


# --- the two formats


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
    machine = _Machine(source)
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
    return _Assembly(mapped, places, mapped[order : order + min(length, 8)] == b"big", source).finished(content)


def _entries(file: io.FileIO, mapped: mmap.mmap, source: str) -> dict[str, tuple[int, int, int]]:
    """Name -> (where it starts, bytes, checksum) of the files within a zip file; stored, whole, and side by side."""
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
    """Five pickles, then the storages in the order of the fifth: a count of elements and the bytes of each."""
    position = 0
    machine = _Machine(source)
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
    return _Assembly(mapped, places, is_big, source).finished(content)


# --- what the machine makes beside plain values: claims, which name no memory yet


class _Name(NamedTuple):
    """A name that a pickle asked for; one of `BUILDERS`."""

    dotted: str


@dataclass(frozen=True, eq=False)
class _Storage:
    """`elements` numbers in the file, of which a view has those from `first` on."""

    key: str
    dtype: torch.dtype
    elements: int
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class _Claim:
    """A tensor to be made: where it lies in its storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def overlaps(self) -> bool:
        """Whether two of its elements may be one number in memory."""
        reach = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size > 1:
                if stride < reach:
                    return True
                reach = stride * (size - 1) + reach
        return False


class _Parameters(dict):
    """A `ParameterDict`: the mapping that it holds."""


@dataclass(eq=False)
class _NumpyType:
    """The type of numpy numbers, of which only the name and the order of bytes mean anything."""

    letter: str
    order: str = "<"


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Claim:
    """Of `torch._utils._rebuild_tensor_v2`: what lies outside its storage, or is larger, is refused."""
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without a storage")
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or len(size) > DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor of size {short(size)} with strides {short(stride)} from {short(offset)}")
    claim = _Claim(storage, storage.first + offset, tuple(size), tuple(stride))
    if math.prod(size) == 0:
        if math.prod(n or 1 for n in size) > EXPANDED:
            raise ValueError(f"an empty tensor of size {short(size)}")
        return claim
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if last >= storage.count:
        raise ValueError(f"a tensor of size {short(size)} reaches beyond its storage of {storage.count} numbers")
    if claim.nbytes > max(storage.count * storage.dtype.itemsize, EXPANDED):
        raise ValueError(f"a tensor of size {short(size)} on a storage of {storage.count} numbers")
    return claim


def _same(value: Any, *_: Any) -> Any:
    return value


def _with_attributes(function: Any, _kind: Any, args: Any, _attributes: Any) -> Any:
    """A tensor that had attributes of Python, which are left out."""
    if not isinstance(function, _Name) or not function.dotted.startswith("torch._utils."):
        raise ValueError(f"{short(function)} in place of a tensor")
    return BUILDERS[function.dotted](*_only(args, tuple))


def _mapping(pairs: Any = ()) -> dict:
    return dict([(_key(name), value) for name, value in (pairs.items() if isinstance(pairs, dict) else pairs)])


def _counter(counts: Any = ()) -> Counter:
    if not isinstance(counts, dict) or any(type(n) is not int for n in counts.values()):
        raise ValueError(f"a Counter of {short(counts)}")
    return Counter(counts)


def _numpy_type(name: Any, *_: Any) -> _NumpyType:
    if not isinstance(name, str) or name.lstrip("<>|=") not in NUMPY:
        raise ValueError(f"a number of numpy's type {short(name)}")
    return _NumpyType(NUMPY[name.lstrip("<>|=")], ">" if name.startswith(">") else "<")


def _numpy_number(kind: Any, raw: Any) -> int | float | bool:
    if not isinstance(kind, _NumpyType):
        raise ValueError("a number of no type")
    (value,) = struct.unpack(kind.order + kind.letter, raw.encode() if isinstance(raw, str) else raw)
    return value


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {short(encoding)}")
    return text.encode(encoding)


# What a pickle may "call". Python 2 called `builtins` `__builtin__`.
BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.nn.modules.container.ParameterDict": lambda: _Parameters(),
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *parts: ":".join(str(part) for part in parts if isinstance(part, (str, int))),
    "collections.OrderedDict": _mapping,
    "collections.Counter": _counter,
    "_codecs.encode": _encoded,
    **{f"{module}.set": lambda items=(): {_key(item) for item in items} for module in ("builtins", "__builtin__")},
    **{f"{module}.bytes": lambda: b"" for module in ("builtins", "__builtin__")},
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
}
# Classes that are mere names in the files: Lightning's bookkeeping in SD v1 has one as a key.
CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
)
SPECIAL = ("torch._utils._rebuild_", "torch._tensor.", "torch.sparse.", "torch.nested.")


def _key(value: Any) -> Any:
    """A value that may be a key or in a set: plain, and no integer of those that all have the same hash."""
    if type(value) not in (*SCALARS, type) or type(value) is int and abs(value) >= 2**60:
        raise ValueError(f"a {type(value).__name__} as a key")
    return value


# --- the machine


class _Machine:
    """Runs pickles, one after another. `storages` are those that they named, by key."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.storages: dict[str, _Storage] = {}

    def run(self, data: bytes) -> tuple[Any, int]:
        """The value of a pickle, and the number of bytes up to its end."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def above_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        for number, (operation, arg, position) in enumerate(pickletools.genops(data)):
            if number > OPERATIONS:
                raise InputError(f"{self.source} refused: its pickle has more than {OPERATIONS} operations")
            match operation.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop(), position + 1
                case "MARK":
                    marks.append(len(stack))
                case (
                    "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE"
                    | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
                ):  # fmt: skip
                    stack.append(arg)
                case "BINSTRING" | "SHORT_BINSTRING":
                    stack.append(_text(arg))
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation.name])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_SET":
                    stack.append(set())
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    marks.append(len(stack) - int(operation.name[-1]))
                    stack.append(tuple(above_mark()))
                case "TUPLE":
                    stack.append(tuple(above_mark()))
                case "APPEND" | "APPENDS":
                    items = [stack.pop()] if operation.name == "APPEND" else above_mark()
                    _only(stack[-1], list).extend(items)
                case "SETITEM" | "SETITEMS":
                    marks += [len(stack) - 2] if operation.name == "SETITEM" else []
                    items = above_mark()
                    _only(stack[-1], dict).update(
                        (_key(name), value) for name, value in zip(items[::2], items[1::2], strict=True)
                    )
                case "ADDITEMS":
                    items = above_mark()
                    _only(stack[-1], set).update(_key(item) for item in items)
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GLOBAL":
                    stack.append(self._named(arg.replace(" ", ".", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(self._named(f"{module}.{name}"))
                case "REDUCE" | "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(BUILDERS[_only(function, _Name).dotted](*_only(args, tuple)))
                case "BUILD":
                    state = stack.pop()
                    _build(stack[-1], state)
                case "BINPERSID":
                    stack.append(self._storage(*_only(stack.pop(), tuple)))
                case other:
                    raise InputError(f"{self.source} refused: its pickle uses {other}, which no weights need")
        raise ValueError("its pickle has no end")

    def _named(self, dotted: str) -> Any:
        if dotted in BUILDERS:
            return _Name(dotted)
        module, _, name = dotted.rpartition(".")
        if dotted in CLASSES:
            return type(name, (), {"__module__": module})  # an empty class in its place
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        dtypes = {str(dtype): dtype for dtype in DTYPES.values()}
        if dotted in dtypes:
            return dtypes[dotted]
        if dotted.startswith(SPECIAL):
            raise InputError(
                f"{self.source} refused: it holds a tensor that is sparse, quantized or of another kind than plain "
                f"numbers ({short(dotted)[1:-1]}); expected weights: save them as .safetensors"
            )
        raise InputError(
            f"{self.source} refused: its pickle asks for {short(dotted)[1:-1]}, which is code, not weights; "
            "get a .safetensors file"
        )

    def _storage(self, word: Any, dtype: Any, key: Any, _location: Any, elements: Any, view: Any = None) -> _Storage:
        if word != "storage" or not isinstance(dtype, torch.dtype) or type(elements) is not int or elements < 0:
            raise ValueError(f"{short(word)} in place of a storage")
        key, first, count = str(_only(key, str)), 0, elements
        if view is not None:
            _, first, count = view
            if type(first) is not int or type(count) is not int or min(first, count) < 0 or first + count > elements:
                raise ValueError(f"a view of {short(count)} from {short(first)} in a storage of {elements}")
        storage = _Storage(key, dtype, elements, first, count)
        known = self.storages.setdefault(key, storage)
        if (known.dtype, known.elements) != (dtype, elements):
            raise ValueError(f"storage {short(key)} has two types or sizes")
        return storage


def _only(value: Any, kind: type) -> Any:
    """The value, which must be of a kind; a `_Parameters` is no dict to a pickle."""
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} in place of a {kind.__name__.strip('_')}")
    return value


def _build(made: Any, state: Any) -> None:
    """What a pickle adds to a thing that it made."""
    match made:
        case _Parameters():
            parameters = state.get("_parameters") if isinstance(state, dict) else None
            made.update(parameters if isinstance(parameters, dict) else {})
        case _NumpyType() if isinstance(state, tuple) and len(state) > 1:
            made.order = ">" if state[1] == ">" else "<"
        case dict():
            pass  # attributes of an OrderedDict, which hold no weights
        case _:
            raise ValueError(f"a state for a {type(made).__name__}")


def _text(latin: str) -> str | bytes:
    """A string of Python 2: text where it is UTF-8, else bytes."""
    raw = latin.encode("latin-1")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


# --- tensors in the place of claims


@dataclass
class _Assembly:
    """Puts tensors on the bytes of a file into what the machine made."""

    mapped: mmap.mmap
    places: Mapping[str, int]
    is_big: bool  # the most significant byte comes first
    source: str
    storages: dict[str, torch.UntypedStorage] = field(default_factory=dict)
    made: dict[int, tuple[Any, int] | None] = field(default_factory=dict)
    claimed: int = 0

    def finished(self, value: Any) -> Any:
        return self._finished(value, 0)[0]

    def _finished(self, value: Any, depth: int) -> tuple[Any, int]:
        """The finished value, and how many values it holds, those that are there several times counted so."""
        if type(value) in (*SCALARS, torch.dtype, type, Counter):
            return value, 1
        if id(value) in self.made:
            if (known := self.made[id(value)]) is None:
                raise ValueError("a list or dict that contains itself")
            return known
        if depth > DEPTH:
            raise InputError(f"{self.source} refused: what it holds is nested more than {DEPTH} deep")
        self.made[id(value)] = None
        match value:
            case _Claim():
                result = self._tensor(value), 1
            case _Name() | _Storage() | _NumpyType():
                raise ValueError(f"a bare {type(value).__name__.strip('_')}")
            case dict():
                parts = [self._finished(part, depth + 1) for part in value.values()]
                result = dict(zip(value, (part for part, _ in parts), strict=True)), 1 + sum(n for _, n in parts)
            case list() | tuple():
                parts = [self._finished(part, depth + 1) for part in value]
                result = type(value)(part for part, _ in parts), 1 + sum(n for _, n in parts)
            case set():
                result = value, 1 + len(value)
        if result[1] > VALUES:
            raise InputError(f"{self.source} refused: it unfolds to more than {VALUES} values")
        self.made[id(value)] = result
        return result

    def _tensor(self, claim: _Claim) -> Tensor:
        self.claimed += claim.nbytes
        if self.claimed > SHARED * len(self.mapped) + EXPANDED:
            raise InputError(f"{self.source} refused: its tensors claim more than {SHARED} times the bytes of the file")
        dtype = claim.storage.dtype
        if not claim.nbytes:
            return torch.empty(claim.size, dtype=dtype)
        empty = torch.empty(0, dtype=dtype)
        tensor = empty.set_(self._storage(claim.storage), claim.offset, claim.size, claim.stride)
        return tensor.contiguous() if claim.overlaps() else tensor

    def _storage(self, storage: _Storage) -> torch.UntypedStorage:
        if storage.key not in self.storages:
            place = self.places[storage.key]
            part = torch.frombuffer(self.mapped, dtype=torch.uint8, count=storage.nbytes, offset=place)
            is_aligned = place % storage.dtype.itemsize == 0
            untyped = part.untyped_storage() if is_aligned else part.clone().untyped_storage()
            if self.is_big:
                untyped = untyped.clone()
                untyped.byteswap(storage.dtype)
            self.storages[storage.key] = untyped
        return self.storages[storage.key]
