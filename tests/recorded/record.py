"""Record what the tests compare with: all cases, or those whose names contain a word of the command line."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from tests.recorded.cases import CASES, FAMILIES, dreambooth, run, subject
from tests.recorded.inputs import HERE, make
from tests.recorded.machine import MACHINE, THREADS, differences, this_machine

NUMBERS = HERE / "numbers"


def dumps(content: dict) -> str:
    """JSON with a line for each tensor, picture and list of losses, so that a change shows in a diff."""
    return _dumps(content, "") + "\n"


def _dumps(content, indent: str) -> str:
    flat = json.dumps(content)
    if not isinstance(content, dict) or not any(isinstance(value, (dict, list)) for value in content.values()):
        return flat
    inner = indent + " "
    lines = [f"{inner}{json.dumps(key)}: {_dumps(value, inner)}" for key, value in content.items()]
    return "{\n" + ",\n".join(lines) + "\n" + indent + "}"


def read(name: str) -> dict:
    return json.loads((NUMBERS / f"{name}.json").read_text())


def main(words: list[str]) -> None:
    torch.set_num_threads(THREADS)
    chosen = [name for name in CASES if not words or any(word in name for word in words)]
    if words and (other := differences(json.loads(MACHINE.read_text()))):
        sys.exit("error: the other cases were recorded on another machine; record all: " + "; ".join(other))
    NUMBERS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        inputs = make(work / "inputs")
        if not words:
            write_files(inputs, work)
            for old in NUMBERS.glob("*.json"):
                old.unlink()
        for name in chosen:
            (NUMBERS / f"{name}.json").write_text(dumps(run(name, inputs, work / name)))
            print("recorded", name)
    MACHINE.write_text(json.dumps(this_machine(), indent=1) + "\n")


def write_files(inputs: Path, work: Path) -> None:
    """The folders that the samplers draw with: trained at a high rate, so that every picture shows them."""
    for name in ("attn2o-ffni", "lora-attention"):
        config = FAMILIES[name].keywords["config"]
        base = [HERE.parents[1] / "configs/sd-mini" / f"{config}.yaml", HERE / "small.yaml", HERE / "sizes.yaml"]
        high = "model.base_learning_rate=1e-2"
        made = dreambooth(inputs, work / f"file {name}", "--base", *base, *subject(inputs), high)
        shutil.rmtree(HERE / "files" / name, ignore_errors=True)
        shutil.copytree(made / "checkpoints" / "20-adapters", HERE / "files" / name)


if __name__ == "__main__":
    main(sys.argv[1:])
