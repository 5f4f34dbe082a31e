"""Functions that read what users and files say, on inputs that hypothesis makes up: one line, or an answer."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.campaign.attacks import Attack, Failed, Family, judged
from tests.campaign.forked import forked
from tests.campaign.world import World

INPUTS = 200  # of one attack

plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
names = st.sampled_from(
    ["adapters", "families", "family", "target", "params", "tensors", "kind", "name", "din", "dout", "blocks", "scale",
     "format", "mid_dim", "words", "vectors", "rank", "model", "data", "defaults", "<new1>"]
) | st.text(max_size=8)  # fmt: skip
nested = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5), max_leaves=12
)
mappings = st.dictionaries(names, nested, max_size=6)
# Bytes that begin as the formats do, so that the readers go on beyond the first look.
beginnings = st.sampled_from([b"", b"PK\3\4", b"\x80\2", b"\x10\0\0\0\0\0\0\0{", b"\xef\xbb\xbf", b"<", b"\x89PNG"])
some_bytes = st.tuples(beginnings, st.binary(max_size=300)).map(b"".join)
safetensors = mappings.map(
    lambda value: (text := json.dumps(value).encode()) and len(text).to_bytes(8, "little") + text + bytes(64)
)
yaml_text = st.text(
    alphabet=st.sampled_from("ab01:-[]{}&*!|>%@'\"#,.?\n \t~<=${}éｘ\u2028\x00"), max_size=60
)  # fmt: skip


def written(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogatepass"))
    return path


def weights(value: bytes) -> None:
    from ldm.checkpoints import read_weights

    read_weights(written(Path("file"), value))


def identified(value: bytes) -> None:
    from ldm.interchange import identify

    identify(written(Path("file"), value))


def adapter_json(value: Any) -> None:
    from ldm.modules.folders import read_config

    Path("folder").mkdir(exist_ok=True)
    written(Path("folder/adapter_config.json"), json.dumps(value))
    read_config(Path("folder"))


def inspected(value: Any) -> None:
    from ldm.interchange.inspection import describe

    Path("folder").mkdir(exist_ok=True)
    written(Path("folder/adapter_config.json"), json.dumps(value))
    describe(Path("folder"))


def config(value: str) -> None:
    from ldm.config import load_config

    load_config(written(Path("config.yaml"), value))


def overrides(value: list[str]) -> None:
    from ldm.config import parse_overrides

    parse_overrides(value)


def command_line(value: list[str]) -> None:
    from ldm.train.options import dreambooth_parser, parse

    parse(dreambooth_parser(""), [word for word in value if word not in ("-h", "--help")])


def prompts(value: bytes) -> None:
    from ldm.commands.sample import read_prompts

    read_prompts(Namespace(from_file=str(written(Path("prompts.txt"), value)), prompt=""))


def picture(value: bytes) -> None:
    from ldm.data.pictures import read_picture

    read_picture(written(Path("picture.png"), value))


def gpus(value: Any) -> None:
    from ldm.train.trainer_section import gpu_options

    gpu_options(value)


words = st.sampled_from(
    ["-t", "-r", "-b", "--base", "--gpus", "--seed", "-n", "--max_steps", "--precision", "--foo", "true", "0,", "a.b=1",
     "a.b=", "=", "model.params.x=[1", "model.params.x=${y}", "--logger=1", "--devices", "--", "-", "--modifier_token"]
) | st.text(max_size=12)  # fmt: skip

# What is read: how inputs are made, and the function that reads one.
READERS: dict[str, tuple[st.SearchStrategy, Callable[[Any], None]]] = {
    "a checkpoint": (some_bytes | safetensors, weights),
    "a file of any kind": (some_bytes | safetensors, identified),
    "adapter_config.json": (nested | mappings, adapter_json),
    "a folder that is inspected": (nested | mappings, inspected),
    "a config": (yaml_text | mappings.map(json.dumps), config),
    "overrides": (st.lists(words | yaml_text, max_size=4), overrides),
    "a command line": (st.lists(words, max_size=6), command_line),
    "prompts": (some_bytes, prompts),
    "a picture": (some_bytes, picture),
    "--gpus": (plain | st.text(alphabet="0123456789,-[] ", max_size=12), gpus),
}


def attack(world: World, random: Random, number: int, work: Path) -> Attack:
    name = list(READERS)[number % len(READERS)]
    inputs, read = READERS[name]
    start = random.randrange(2**32)
    what = f"{name}, {INPUTS} inputs from {start}"
    return Attack(what, lambda: judged(forked(lambda: made_up(inputs, read, start), work, 120)))


def made_up(inputs: st.SearchStrategy, read: Callable[[Any], None], start: int) -> None:
    """Read many inputs; raises `Failed` with the smallest one that is neither read nor refused in one line."""
    from ldm.errors import InputError

    latest: list[Any] = []

    @seed(start)
    @settings(
        max_examples=INPUTS, database=None, deadline=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(inputs)
    def check(value: Any) -> None:
        latest[:] = [value]
        try:
            read(value)
        except InputError as error:
            line = " ".join(str(error).split())
            if not line or len(line) > 2000:
                raise Failed(f"an error line of {len(line)} characters") from None

    try:
        check()
    except BaseException as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise Failed(f"on {repr(latest[0])[:200]}: {told}") from None


FAMILY = Family("readers", attack, f"readers, {INPUTS} made-up inputs each", all=10 * len(READERS), few=len(READERS))
