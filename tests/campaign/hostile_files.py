"""Hostile files of every kind that is read: crafted pickles, bombs, and claims beyond what a file holds.

`generate(folder, seed)` writes them; `python -m tests.campaign.read_hostile_files folder` reads them all and tells how
long each took and how much memory.
"""

import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.campaign import torch_files as t

CODE = "refused: its pickle asks for .*, which is code, not weights"
DAMAGED = "is truncated or damaged|no end"
SPECIAL = "holds a tensor that is sparse, quantized or of another kind"
BLOCK = "middle_block.1.transformer_blocks.0"
LAYER = f"model.diffusion_model.{BLOCK}.attn1.to_q"


@dataclass(frozen=True)
class Case:
    """A file or folder, how it is to be read (a key of `read_hostile_files.READERS`), and what its refusal says.

    An `expectation` of None is a file that is read.
    """

    path: Path
    kind: str
    expectation: str | None


def generate(folder: Path, seed: int = 0) -> list[Case]:
    """Write all of them. The seed decides what their random parts are."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draws = random.Random(seed)
    makers: list[Callable[[Path, random.Random], Iterator[Case]]] = [
        pickles, zips, safetensors, adapter_folders, loras, texts, pictures, encoders
    ]  # fmt: skip
    return [case for make in makers for case in make(folder, draws)]


# --- torch files

DTYPE = t.call("numpy.dtype", t.text("f8"), b"\x89", b"\x88")


def _objects() -> bytes:
    """The state that makes numpy take eight bytes of the file for the address of an object."""
    state = t.many(t.number(3), t.text("|"), b"NNN", t.number(8), t.number(1), t.number(63))
    return t.call("numpy._core.multiarray.scalar", t.call("numpy.dtype", t.text("O8"), b"\x89", b"\x88") + state + b"b",
                  t.raw(b"A" * 8))  # fmt: skip


BODIES: dict[str, tuple[bytes, str | None]] = {
    "an object for a number": (_objects(), "numpy's type 'O8'"),
    "a crafted state for a number": (
        t.call("numpy.core.multiarray.scalar", DTYPE + t.many(t.number(3), t.text("|"), b"NN}", t.number(8),
               t.number(1), t.number(63)) + b"b", t.raw(b"A" * 8)), None),
    "a number of few bytes": (t.call("numpy.core.multiarray.scalar", DTYPE, t.raw(b"AA")), DAMAGED),
    "a command": (t.call("os.system", t.text("touch ran")), CODE),
    "a class alone": (t.name("builtins.eval"), CODE),
    "another module": (t.call("antigravity.x"), CODE),
    "a long name": (t.name("a." + "b" * 100_000), CODE),
    "rows out of nothing": (t.tensor([10**8, 8], [0, 1]), "size .* on a storage of 8"),
    "beyond the storage": (t.tensor([9], [1]), "reaches beyond its storage"),
    "a far offset": (t.tensor([8], [1], 2**62), "reaches beyond its storage"),
    "a stride of overflow": (t.tensor([3], [2**63]), "reaches beyond its storage"),
    "sizes of overflow": (t.tensor([2**32, 2**32], [0, 0]), "on a storage of 8"),
    "a negative stride": (t.tensor([4], [-1], 4), DAMAGED),
    "a negative size": (t.tensor([-4], [1]), DAMAGED),
    "a negative offset": (t.tensor([4], [1], -4), DAMAGED),
    "many dimensions": (t.tensor([1] * 100, [1] * 100), DAMAGED),
    "an empty giant": (t.tensor([0, 10**12], [1, 1]), "an empty tensor"),
    "a storage of claims": (t.tensor([8], [1], count=10**11), "tensors need|has not the size"),
    "a negative storage": (t.tensor([8], [1], count=-8), DAMAGED),
    "another storage": (t.tensor([8], [1], key="../../1"), "is missing|list of storages"),
    "two types": (b"](" + t.tensor([8], [1]) + t.tensor([4], [1], kind="DoubleStorage", count=4) + b"e", "two types"),
    "a wrong view": (t.tensor([4], [1], view=t.many(t.text("1"), t.number(6), t.number(4))), "a view of"),
    "sparse": (t.call("torch._utils._rebuild_sparse_tensor"), SPECIAL),
    "quantized": (t.call("torch._utils._rebuild_qtensor"), SPECIAL),
    "meta": (t.call("torch._utils._rebuild_meta_tensor_no_storage"), SPECIAL),
    "a subclass": (t.call("torch._utils._rebuild_wrapper_subclass"), SPECIAL),
    "out of numpy": (t.call("torch._utils._rebuild_device_tensor_from_numpy"), SPECIAL),
    "bytes as a file": (t.call("torch.storage._load_from_bytes", t.raw(b"x")), CODE),
    "a storage of its own": (t.call("torch.storage.UntypedStorage", t.number(10**12)), CODE),
    "a typed attribute": (t.call("torch._tensor._rebuild_from_type_v2", t.name("builtins.set"), t.name("torch.Tensor"),
                          b")", b"}"), DAMAGED),
    "a state for a function": (t.name("collections.OrderedDict") + b"}b", DAMAGED),
    "a bare function": (t.name("collections.OrderedDict"), "a bare Name"),
    "a bare storage": (t.storage(), "a bare Storage"),
    "an instance of a class": (t.name("torch.nn.parameter.Parameter") + b")\x81", DAMAGED),
    "deep tuples": (b")" + b"\x85" * 500_000, "nested more than|damaged"),
    "a deep key": (b"}" + b")" + b"\x85" * 500_000 + b"Ns", DAMAGED),
    "deep lists": (b"]" * 200_000 + b"a" * 199_999, "nested more than|damaged"),
    "a list in itself": (b"]q\x00h\x00a", "contains itself"),
    "a dict in itself": (b"}q\x00(X\x01\x00\x00\x00ah\x00u", "contains itself"),
    "laughs": (b"K\x01" + b"".join(b"q\x00(" + b"h\x00" * 10 + b"t" for _ in range(40)), "unfolds to more than"),
    "another operation": (b"N0" * 10, "uses POP"),
    "many dicts": (b"](" + b"}" * 2_100_000 + b"e", "has more than .* operations"),
    "a far memo": (b"Nr\xff\xff\xff\x7f", None),
    "colliding keys": (b"}(" + b"".join(t.number(i * (2**61 - 1)) + b"N" for i in range(1, 20_000)) + b"u", DAMAGED),
    "a huge text": (b"X\xff\xff\xff\x7fabc", DAMAGED),
    "a wrong mark": (b"tttt", DAMAGED),
    "an empty stack": (b"R", DAMAGED),
    "other operations": (b"ctypes\nCDLL\n(i", "damaged|code|uses"),
    "an extension": (b"\x82\x01", "uses EXT1"),
}  # fmt: skip


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def pickles(folder: Path, draws: random.Random) -> Iterator[Case]:
    for name, (body, expectation) in BODIES.items():
        for form, write in t.FORMATS.items():
            path = folder / f"{_slug(name)}.{form}.pt"
            path.write_bytes(write(body) if t.name("torch.FloatStorage") in body else write(body, {}))
            yield Case(path, "object", expectation)
    for number in range(40):  # what becomes of them is told by chance, but never more than a refusal
        path = folder / f"mutant-{number}.pt"
        path.write_bytes(t.FORMATS[draws.choice(["zip", "old"])](t.mutant(draws.choice(t.bodies()), draws)))
        yield Case(path, "object", ".*")


def zips(folder: Path, _: random.Random) -> Iterator[Case]:
    good = t.mapping({"a": t.tensor([8], [1])})

    def case(name: str, data: bytes, expectation: str | None) -> Case:
        path = folder / f"{_slug(name)}.pt"
        path.write_bytes(data)
        return Case(path, "object", expectation)

    yield case("a good file", t.zipped(good), None)
    yield case("a bomb", t.zipped(good, {"0": bytes(2**28)}, zipfile.ZIP_DEFLATED), "is compressed")
    yield case("a pickle bomb", t.zipped(b"](" + b"N" * 2**27 + b"e", None, zipfile.ZIP_DEFLATED), "is compressed")
    yield case("no pickle", _plain_zip({"readme.txt": b"hello"}), "it has no data.pkl")
    yield case("two pickles", _plain_zip({"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "it has no data.pkl")
    yield case("a large pickle", _plain_zip({"a/data.pkl": bytes(2**26 + 1)}), "its data.pkl has")
    yield case("many entries", _plain_zip({f"a/{i}": b"" for i in range(50_000)}), "it has no data.pkl")
    shared = bytearray(t.zipped(good))
    entries = [i for i in range(len(shared)) if shared[i : i + 4] == b"PK\1\2"]
    shared[entries[2] + 42 : entries[2] + 46] = shared[entries[0] + 42 : entries[0] + 46]
    yield case("entries on each other", bytes(shared), "overlaps another|is compressed|damaged")
    wrong = t.zipped(good).replace(b"OrderedDict", b"OrderedDicT")
    yield case("a wrong checksum", wrong, "checksum of data.pkl|code")
    yield case("half a file", t.zipped(good)[:300], "is truncated")
    yield case("half an old file", t.old(good)[:-8], "is cut off|has not the size")


def _plain_zip(files: dict[str, bytes]) -> bytes:
    path = t.io.BytesIO()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path.getvalue()


# --- safetensors


def _safetensors(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def safetensors(folder: Path, _: random.Random) -> Iterator[Case]:
    deep = b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    headers = {
        "a deep header": (deep, "truncated or damaged"),
        "a header of claims": (json.dumps({"a": entry | {"shape": [10**9]}}).encode(), "truncated or damaged"),
        "two on one place": (json.dumps({"a": entry, "b": entry}).encode(), "truncated or damaged"),
        "an empty giant in it": (
            json.dumps({"a": {"dtype": "F32", "shape": [0, 10**12], "data_offsets": [0, 0]}}).encode(),
            "is empty, with the shape|damaged",
        ),
        "a large header": (b'{"__metadata__":{"a":"' + b"x" * 2**25 + b'"}}', "its header has"),
    }  # fmt: skip
    for name, (header, expectation) in headers.items():
        yield Case(_safetensors(folder / f"{_slug(name)}.safetensors", header, bytes(16)), "object", expectation)
    far = _safetensors(folder / "a-far-header.safetensors", b"{}", length=2**62)
    yield Case(far, "object", "truncated or damaged")


# --- folders of adapters


def _folder(path: Path, config, adapters=None, tuned=None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name, tensors in (("adapters", adapters), ("tuned", tuned)):
        if tensors:
            save_file(tensors, path / f"{name}.safetensors")
    return path


def _adapter(**changes) -> dict:
    entry = {"kind": "transformer_adp_config", "name": "adapter_inout", "din": "attn2o", "dout": "ffni", "scale": 1.0,
             "mid_dim": 4, "method": "relu", "blocks": [BLOCK]}  # fmt: skip
    return {"adapters": [entry | changes]}


def _family(name: str, params: dict, tensors: dict) -> dict:
    return {"adapters": [], "families": [{"family": name, "params": params, "tensors": list(tensors)}]}


def adapter_folders(folder: Path, _: random.Random) -> Iterator[Case]:
    own = f"{BLOCK}.adapter_inout.adp"
    tensors = {f"{own}.0.weight": torch.ones(4, 64), f"{own}.0.bias": torch.ones(4),
               f"{own}.2.weight": torch.ones(64, 4), f"{own}.2.bias": torch.ones(64)}  # fmt: skip
    wide = dict(tensors) | {f"{own}.0.bias": torch.ones(10**6)}
    configs = {
        "mid_dim": (_adapter(mid_dim=10**7), tensors, "has more numbers than its tensors"),
        "mid_dim of one": (_adapter(mid_dim=10**6), wide, "has more numbers than its tensors"),
        "blocks": (_adapter(blocks=[BLOCK] * 100_000), tensors, "no tensors of its own"),
        "other blocks": (_adapter(blocks=[f"{BLOCK}{i}" for i in range(100_000)]), tensors, "belong to no adapter"),
        "deep": ('{"adapters":' + "[" * 100_000 + "]" * 100_000 + "}", tensors, "nested more than"),
        "huge": ('{"adapters":[' + "[]," * 6_000_000 + "[]]}", tensors, "refused: it has more than"),
        "no json": ("\ufeff{", tensors, "no valid JSON"),
        "a long number": ('{"adapters": ' + "9" * 10_000 + "}", tensors, "no valid JSON"),
    }
    for name, (config, held, expectation) in configs.items():
        yield Case(_folder(folder / f"adapters-{_slug(name)}", config, held), "folder", expectation)
    factors = {f"{LAYER}.lora_A.default.weight": torch.ones(2, 64), f"{LAYER}.lora_B.default.weight": torch.ones(64, 2)}
    word = {"cond_stage_model.new_tokens.vectors.<new0-0>": torch.ones(1, 128)}
    more = "has at least .* numbers"
    families = {
        "rank": ("lora", {"rank": 3 * 10**6, "targets": [LAYER]}, factors, more),
        "a pattern of rank": ("lora", {"rank": 2, "targets": [LAYER], "options": {"rank_pattern": {"to_q": 10**7}}},
                              factors, more),
        "a pattern that takes long": ("lora", {"targets": [LAYER], "options": {"alpha_pattern": {"(a|.)*.*.*.*!": 1}}},
                                      factors, "expected names of layers"),
        "many patterns": ("lora", {"targets": [f"x{i}" for i in range(10**6)]}, factors, "at most 256 patterns"),
        "alpha": ("lora", {"targets": [LAYER], "alpha": 1e999}, factors, "finite"),
        "vectors": ("textual-inversion", {"words": "<a>", "vectors": 10**9}, word, more),
        "a pattern of names": ("weights-by-name", {"pattern": r"((\w|\.)*)*!"}, word, "takes too long|matches"),
    }  # fmt: skip
    for name, (family, params, held, expectation) in families.items():
        path = _folder(folder / f"family-{_slug(name)}", _family(family, params, held), tuned=held)
        yield Case(path, "folder", expectation)


# --- LoRA files, deltas and words


def loras(folder: Path, _: random.Random) -> Iterator[Case]:
    unet = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    kohya = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {f"{unet}.lora_A.weight": torch.ones(2, 64), f"{unet}.lora_B.weight": torch.ones(64, 2)}
    down_up = {f"{kohya}.lora_down.weight": torch.ones(2, 64), f"{kohya}.lora_up.weight": torch.ones(64, 2)}
    published = {"unet:0:down": torch.ones(2, 64), "unet:0:up": torch.ones(64, 2)}

    def about(**told) -> dict[str, str]:
        return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in told.items()})}

    deep = "[" * 100_000 + "]" * 100_000
    files = {
        "alpha": (down_up | {f"{kohya}.alpha": torch.tensor(float("inf"))}, {}, "finite"),
        "two alphas": (down_up | {f"{kohya}.alpha": torch.ones(2)}, {}, "finite"),
        "lora_alpha": (factors, {"lora_adapter_metadata": '{"unet.lora_alpha": 1e999}'}, "finite"),
        "a pattern that takes long": (factors, about(alpha_pattern={r"((\w|\.)*)*!": 2}), ".*"),
        "a damaged pattern": (factors, about(alpha_pattern={"(": 2}), "not a regular expression"),
        "a long pattern": (factors, about(alpha_pattern={"a" * 10**6: 2}), "too long"),
        "deep": (factors, {"lora_adapter_metadata": deep}, "nested more than"),
        "rank": ({f"{unet}.lora_A.weight": torch.ones(3 * 10**6, 1, dtype=torch.int8),
                  f"{unet}.lora_B.weight": torch.ones(1, 2)}, {}, "expected .rank, inputs"),
        "a product": ({f"{unet}.lora_A.weight": torch.ones(1, 10**5), f"{unet}.lora_B.weight": torch.ones(10**5, 1)},
                      {}, None),
        "published, deep": (published, {"unet": deep}, "refused|no valid JSON"),
        "published, a product": ({"unet:0:down": torch.ones(1, 10**5), "unet:0:up": torch.ones(10**5, 1)},
                                 {"unet": '["Attention"]'}, None),
        "published, other ranks": ({"unet:0:down": torch.ones(1, 8), "unet:0:up": torch.ones(8, 3)},
                                   {"unet": '["Attention"]'}, "has factors of"),
    }  # fmt: skip
    for name, (tensors, metadata, expectation) in files.items():
        path = folder / f"lora-{_slug(name).replace(',', '')}.safetensors"
        save_file(tensors, path, metadata)
        yield Case(path, "describe", expectation)
    delta = {f"{LAYER.replace('attn1', 'attn2').replace('to_q', 'to_k')}.weight": {"u": 1, "v": "x"}}
    rows = {f"{LAYER.replace('attn1', 'attn2').replace('to_q', 'to_k')}.weight": torch.ones(4, 4), "embed": [1]}
    deltas = (("a delta of text", delta, "neither a weight nor its"), ("rows", rows, "embed must"))
    for name, state, expectation in deltas:
        path = folder / f"{_slug(name)}.pt"
        torch.save({"state_dict": state}, path)
        yield Case(path, "describe", expectation)


# --- text, JSON, YAML


def texts(folder: Path, _: random.Random) -> Iterator[Case]:
    laughs = "a0: &a0 x\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    yamls = {
        "laughs": (laughs, "unfolds to more than"),
        "itself": ("a: &a [*a]\n", "contains itself"),
        "deep": ("a: " + "[" * 5000 + "]" * 5000, "nested more than"),
        "deep blocks": ("".join(" " * i + "a:\n" for i in range(300)), "nested more than"),
        "huge": ("a: 1\n" * 100_000, "more than"),
        "a long number": ("a: " + "9" * 5000, "is not valid YAML"),
        "a good one with a mark": ("\ufeffmodel: {target: a.b}\n", None),
    }
    for name, (text, expectation) in yamls.items():
        path = folder / f"{_slug(name)}.yaml"
        path.write_text(text, encoding="utf-8")
        yield Case(path, "yaml", expectation)
    jsons = {
        "deep": ("[" * 100_000 + "]" * 100_000, "nested more than"),
        "deeper": ("[" * 500 + "]" * 500, "nested more than"),
        "half": ("[1, ", "no valid JSON"),
        "a good one with a mark": ("\ufeff[1]", None),
    }
    for name, (text, expectation) in jsons.items():
        path = folder / f"{_slug(name)}.json"
        path.write_text(text, encoding="utf-8")
        yield Case(path, "json", expectation)


# --- pictures


def _png(width: int, height: int, kind: int = 6, more: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + more + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def pictures(folder: Path, _: random.Random) -> Iterator[Case]:
    text = zlib.compress(bytes(2**27), 9)
    bomb = struct.pack(">I", len(text) + 3) + b"zTXta\0\0" + text
    files = {
        "a large one": _png(12_000, 12_000),
        "a giant": _png(2**31 - 1, 2**31 - 1),
        "text": _png(4, 4, more=bomb + struct.pack(">I", zlib.crc32(bomb[4:]))),
        "a program": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(ran) print\n",
    }
    for name, data in files.items():
        path = folder / f"{_slug(name)}.png"
        path.write_bytes(data)
        yield Case(path, "picture", "cannot read the picture")


# --- CLIP folders


def encoders(folder: Path, _: random.Random) -> Iterator[Case]:
    configs = {
        "width": {"hidden_size": 10**7},
        "layers": {"num_hidden_layers": 10**6},
        "all": {"hidden_size": 8000, "num_hidden_layers": 100, "intermediate_size": 30000},
        "text": {"text_config": {"vocab_size": 10**12}},
        "list": [1],
    }
    for name, config in configs.items():
        path = folder / f"clip-{name}"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        yield Case(path, "clip", "must be|asks for more than")
