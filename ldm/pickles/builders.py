"""The functions that a pickle of weights may "call", and the names that it may use."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from ldm.errors import InputError, short
from ldm.pickles.claims import DIMENSIONS, EXPANDED, Claim, Name, NumpyType, Parameters, Storage, as_key, only

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
# numpy's types by name: the letter for `struct`
NUMPY = {"f2": "e", "f4": "f", "f8": "d", "b1": "?"} | {f"{k}{n}": c for k, cs in (("i", "bhiq"), ("u", "BHIQ"))
                                                       for n, c in zip((1, 2, 4, 8), cs, strict=True)}  # fmt: skip


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Claim:
    """`torch._utils._rebuild_tensor_v2`. Raises `ValueError` for tensors outside their storage, or larger than it."""
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or len(size) > DIMENSIONS or any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"a tensor of size {short(size)} with strides {short(stride)} from {short(offset)}")
    claim = Claim(storage, storage.first + offset, tuple(size), tuple(stride))
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
    """A tensor with Python attributes, which are left out."""
    if not isinstance(function, Name) or not function.dotted.startswith("torch._utils."):
        raise ValueError(f"{short(function)} in place of a tensor")
    return BUILDERS[function.dotted](*only(args, tuple))


def _mapping(pairs: Any = ()) -> dict:
    return dict([(as_key(name), value) for name, value in (pairs.items() if isinstance(pairs, dict) else pairs)])


def _counter(counts: Any = ()) -> Counter:
    if not isinstance(counts, dict) or any(type(n) is not int for n in counts.values()):
        raise ValueError(f"a Counter of {short(counts)}")
    return Counter(counts)


def _numpy_type(name: Any, *_: Any) -> NumpyType:
    if not isinstance(name, str) or name.lstrip("<>|=") not in NUMPY:
        raise ValueError(f"a number of numpy's type {short(name)}")
    return NumpyType(NUMPY[name.lstrip("<>|=")], ">" if name.startswith(">") else "<")


def _numpy_number(kind: Any, raw: Any) -> int | float | bool:
    if not isinstance(kind, NumpyType):
        raise ValueError("a number of no type")
    (value,) = struct.unpack(kind.order + kind.letter, raw.encode() if isinstance(raw, str) else raw)
    return value


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes in the encoding {short(encoding)}")
    return text.encode(encoding)


# The functions that a pickle may "call". `__builtin__` is Python 2's name of `builtins`.
BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.nn.modules.container.ParameterDict": lambda: Parameters(),
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *parts: ":".join(str(part) for part in parts if isinstance(part, (str, int))),
    "collections.OrderedDict": _mapping,
    "collections.Counter": _counter,
    "_codecs.encode": _encoded,
    **{f"{module}.set": lambda items=(): {as_key(item) for item in items} for module in ("builtins", "__builtin__")},
    **{f"{module}.bytes": lambda: b"" for module in ("builtins", "__builtin__")},
    "numpy.dtype": _numpy_type,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
}
# Classes that files only mention: Lightning's bookkeeping in SD v1 has one as a key.
CLASSES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
)
SPECIAL = ("torch._utils._rebuild_", "torch._tensor.", "torch.sparse.", "torch.nested.")


def named(dotted: str, source: str) -> Any:
    """The object for a name in a pickle. Raises `InputError` for names that weights do not need."""
    if dotted in BUILDERS:
        return Name(dotted)
    module, _, name = dotted.rpartition(".")
    if dotted in CLASSES:
        return type(name, (), {"__module__": module})  # an empty class instead
    if module == "torch" and name in DTYPES:
        return DTYPES[name]
    dtypes = {str(dtype): dtype for dtype in DTYPES.values()}
    if dotted in dtypes:
        return dtypes[dotted]
    if dotted.startswith(SPECIAL):
        raise InputError(
            f"{source} refused: it holds a tensor that is sparse, quantized or of another kind than plain "
            f"numbers ({short(dotted)[1:-1]}); expected weights: save them as .safetensors"
        )
    raise InputError(
        f"{source} refused: its pickle asks for {short(dotted)[1:-1]}, which is code, not weights; "
        "get a .safetensors file"
    )


def set_state(made: Any, state: Any) -> None:
    """Apply the state that a pickle sets on an object."""
    match made:
        case Parameters():
            parameters = state.get("_parameters") if isinstance(state, dict) else None
            made.update(parameters if isinstance(parameters, dict) else {})
        case NumpyType() if isinstance(state, tuple) and len(state) > 1:
            made.order = ">" if state[1] == ">" else "<"
        case dict():
            pass  # attributes of an OrderedDict, which are not weights
        case _:
            raise ValueError(f"a state for a {type(made).__name__}")
