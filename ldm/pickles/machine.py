"""The stack machine that runs pickles, of which it knows the operations that weights need."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

import torch

from ldm.errors import InputError, short
from ldm.pickles.builders import BUILDERS, named, set_state
from ldm.pickles.claims import Name, Storage, as_key, only

OPERATIONS = 2_000_000  # a checkpoint of Stable Diffusion has 60,000


class Machine:
    """Runs pickles, one after another. `storages` are those that they named, by key."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.storages: dict[str, Storage] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> tuple[Any, int]:
        """The value of a pickle, and the number of bytes up to its end."""
        self.stack, self.marks, self.memo = [], [], {}
        for number, (operation, arg, position) in enumerate(pickletools.genops(data)):
            if number > OPERATIONS:
                raise InputError(f"{self.source} refused: its pickle has more than {OPERATIONS} operations")
            if operation.name == "STOP":
                return self.stack.pop(), position + 1
            if operation.name not in STEPS:
                raise InputError(f"{self.source} refused: its pickle uses {operation.name}, which no weights need")
            STEPS[operation.name](self, arg)
        raise ValueError("its pickle has no end")

    # --- what one operation does with its argument

    def nothing(self, _: Any) -> None:
        pass

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_text(self, latin: str) -> None:
        self.stack.append(_text(latin))

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def above_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, count: int) -> list[Any]:
        self.marks.append(len(self.stack) - count)
        return self.above_mark()

    def append(self, items: list[Any]) -> None:
        only(self.stack[-1], list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        pairs = zip(items[::2], items[1::2], strict=True)
        only(self.stack[-1], dict).update((as_key(name), value) for name, value in pairs)

    def add_items(self, items: list[Any]) -> None:
        only(self.stack[-1], set).update(as_key(item) for item in items)

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def name(self, arg: str) -> None:
        self.stack.append(named(arg.replace(" ", ".", 1), self.source))

    def name_of_stack(self, _: Any) -> None:
        module, name = self.top(2)
        self.stack.append(named(f"{module}.{name}", self.source))

    def call(self, _: Any) -> None:
        function, args = self.top(2)
        self.stack.append(BUILDERS[only(function, Name).dotted](*only(args, tuple)))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        set_state(self.stack[-1], state)

    def load_storage(self, _: Any) -> None:
        self.stack.append(self._storage(*only(self.stack.pop(), tuple)))

    def _storage(self, word: Any, dtype: Any, key: Any, _location: Any, elements: Any, view: Any = None) -> Storage:
        if word != "storage" or not isinstance(dtype, torch.dtype) or type(elements) is not int or elements < 0:
            raise ValueError(f"{short(word)} in place of a storage")
        key, first, count = str(only(key, str)), 0, elements
        if view is not None:
            _, first, count = view
            if type(first) is not int or type(count) is not int or min(first, count) < 0 or first + count > elements:
                raise ValueError(f"a view of {short(count)} from {short(first)} in a storage of {elements}")
        storage = Storage(key, dtype, elements, first, count)
        known = self.storages.setdefault(key, storage)
        if (known.dtype, known.elements) != (dtype, elements):
            raise ValueError(f"storage {short(key)} has two types or sizes")
        return storage


def _text(latin: str) -> str | bytes:
    """A string of Python 2: text where it is UTF-8, else bytes."""
    raw = latin.encode("latin-1")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


# The operations of pickles that weights need, all but STOP, by their names in `pickletools`.
STEPS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": Machine.nothing,
    "FRAME": Machine.nothing,
    "MARK": Machine.mark,
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
         "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"), Machine.push,
    ),
    "BINSTRING": Machine.push_text,
    "SHORT_BINSTRING": Machine.push_text,
    "NONE": lambda self, _: self.push(None),
    "NEWTRUE": lambda self, _: self.push(True),
    "NEWFALSE": lambda self, _: self.push(False),
    "EMPTY_DICT": lambda self, _: self.push({}),
    "EMPTY_LIST": lambda self, _: self.push([]),
    "EMPTY_SET": lambda self, _: self.push(set()),
    "EMPTY_TUPLE": lambda self, _: self.push(()),
    "TUPLE1": lambda self, _: self.push(tuple(self.top(1))),
    "TUPLE2": lambda self, _: self.push(tuple(self.top(2))),
    "TUPLE3": lambda self, _: self.push(tuple(self.top(3))),
    "TUPLE": lambda self, _: self.push(tuple(self.above_mark())),
    "APPEND": lambda self, _: self.append(self.top(1)),
    "APPENDS": lambda self, _: self.append(self.above_mark()),
    "SETITEM": lambda self, _: self.set_items(self.top(2)),
    "SETITEMS": lambda self, _: self.set_items(self.above_mark()),
    "ADDITEMS": lambda self, _: self.add_items(self.above_mark()),
    "BINGET": Machine.get,
    "LONG_BINGET": Machine.get,
    "BINPUT": Machine.put,
    "LONG_BINPUT": Machine.put,
    "MEMOIZE": Machine.memoize,
    "GLOBAL": Machine.name,
    "STACK_GLOBAL": Machine.name_of_stack,
    "REDUCE": Machine.call,
    "NEWOBJ": Machine.call,
    "BUILD": Machine.build,
    "BINPERSID": Machine.load_storage,
}  # fmt: skip
