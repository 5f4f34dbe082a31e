"""Torch files put together byte by byte, so that they can claim what torch would never write."""

import io
import random
import struct
import zipfile
from collections.abc import Mapping

OLD_MAGIC, OLD_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
DATA = struct.pack("<8f", *range(8))  # of the one storage, "0"


# --- pickles, operation by operation


def name(dotted: str) -> bytes:
    module, _, last = dotted.rpartition(".")
    return b"c" + f"{module}\n{last}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def raw(value: bytes) -> bytes:
    """Bytes as protocol 2 has them."""
    return call("_codecs.encode", text(value.decode("latin1")), text("latin1"))


def many(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(dotted: str, *args: bytes) -> bytes:
    return name(dotted) + many(*args) + b"R"


def mapping(parts: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in parts.items()) + b"u"


def storage(kind: str = "FloatStorage", key: str = "0", count: int = 8, view: bytes = b"") -> bytes:
    return many(text("storage"), name(f"torch.{kind}"), text(key), text("cpu"), number(count), view) + b"Q"


def tensor(size, stride, offset: int = 0, function: str = "torch._utils._rebuild_tensor_v2", **of_storage) -> bytes:
    place = [number(offset), many(*map(number, size)), many(*map(number, stride))]
    return call(function, storage(**of_storage), *place, b"\x89", call("collections.OrderedDict"))


def whole(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


# --- files


def zipped(body: bytes, data: Mapping[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file as torch writes it since 1.6."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", whole(body))
        archive.writestr("archive/byteorder", "little")
        for key, value in ({"0": DATA} if data is None else data).items():
            archive.writestr(f"archive/data/{key}", value)
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def old(body: bytes, data: Mapping[str, bytes] | None = None, width: int = 4) -> bytes:
    """A file as torch wrote it before 1.6."""
    data = {"0": DATA} if data is None else data
    head = [number(OLD_MAGIC), number(OLD_PROTOCOL), mapping({"little_endian": b"\x88"}), body]
    keys = b"](" + b"".join(map(text, data)) + b"e"
    storages = [struct.pack("<q", len(value) // width) + value for value in data.values()]
    return b"".join([*map(whole, [*head, keys]), *storages])


FORMATS = {"zip": zipped, "old": old}


# --- mutants

PIECES = [b"(", b"t", b"R", b"b", b"\x81", b"}", b"]", b"u", b"e", b"s", b"a", b"\x85", b"\x86", b"\x87", b"h\x00",
          b"q\x00", b"Q", b"N", b"\x88", b"0", b"2", b")", number(-1), number(2**31 - 1), number(2**62), number(2**70),
          text("0"), name("numpy.dtype"), name("numpy._core.multiarray.scalar"), name("collections.OrderedDict"),
          name("torch.FloatStorage"), name("torch.Size"), name("builtins.set"), name("os.system"), storage(),
          tensor([8], [1]), tensor([2, 4], [4, 1]), tensor([4], [0])]  # fmt: skip


def mutant(body: bytes, draws: random.Random) -> bytes:
    """A pickle's bytes with a few of them changed, removed, doubled, or operations put between."""
    body = bytearray(body)
    for _ in range(draws.choice([1, 1, 1, 2, 3, 6])):
        at = draws.randrange(len(body) + 1)
        end = min(len(body), at + draws.choice([1, 1, 2, 4, 16]))
        match draws.randrange(8):
            case 5 | 6 | 7:  # another number: a size, a stride, an offset, a count
                places = [i for i in range(len(body) - 4) if body[i] == b"J"[0]]
                value = draws.choice([0, 1, 2, 3, 5, 8, 9, 2**20, 2**31 - 1, -1, draws.randrange(2**31)])
                if places:
                    at = draws.choice(places)
                    body[at : at + 5] = number(value)
            case 0 if at < len(body):
                body[at] = draws.randrange(256)
            case 1:
                del body[at:end]
            case 2:
                body[at:at] = body[at:end]
            case _:
                body[at:at] = draws.choice(PIECES)
    return bytes(body)


def bodies() -> list[bytes]:
    """Good pickles of many kinds, from which mutants are made."""
    kind = call("numpy.dtype", text("f8"), b"\x89", b"\x88") + many(number(3), text("<"), b"NNN", number(-1)) + b"b"
    score = call("numpy.core.multiarray.scalar", kind, raw(struct.pack("<d", 0.5)))
    words = name("torch.nn.modules.container.ParameterDict") + b")\x81" + mapping(
        {"_parameters": mapping({"*": tensor([1, 8], [8, 1])}), "hooks": call("collections.OrderedDict")}
    ) + b"b"  # fmt: skip
    ordered = call("collections.OrderedDict") + b"(" + text("a") + tensor([2, 4], [4, 1]) + b"u"
    ordered += mapping({"_metadata": b"}"}) + b"b"
    return [
        mapping({"a": tensor([2, 4], [4, 1]), "b": tensor([4, 2], [1, 4]), "score": score}),
        mapping({"state_dict": ordered, "epoch": number(3), "seen": call("builtins.set", b"](K\x01K\x02e")}),
        mapping({"string_to_param": words, "string_to_token": mapping({"*": number(265)})}),
        b"](" + tensor([2, 2], [2, 1], 4) + tensor([8, 1], [1, 1]) + tensor([3], [2], 1) + b"e",
    ]
