"""Weights by block of the UNet, as web UIs have them: 12, 17, 20 or 26 numbers, or the name of a preset.

BASE stands for the text encoders and for what is in no block (time embedding, last layers), IN00 to IN11 for
`input_blocks`, M00 for `middle_block`, OUT00 to OUT11 for `output_blocks`.
"""

from __future__ import annotations

import math
import re

from ldm.errors import InputError, short
from ldm.interchange.lora import Lora


def _names(inputs: str, outputs: str) -> tuple[str, ...]:
    inner = [f"IN{int(number):02d}" for number in inputs.split()]
    outer = [f"OUT{int(number):02d}" for number in outputs.split()]
    return ("BASE", *inner, "M00", *outer)


ALL = _names(" ".join(map(str, range(12))), " ".join(map(str, range(12))))
LAYOUTS = {
    12: _names("4 5 7 8", "0 1 2 3 4 5"),  # the attention of SDXL
    17: _names("1 2 4 5 7 8", "3 4 5 6 7 8 9 10 11"),  # the attention of Stable Diffusion
    20: _names("0 1 2 3 4 5 6 7 8", "0 1 2 3 4 5 6 7 8"),  # all blocks of SDXL
    26: ALL,  # all blocks of Stable Diffusion
}


def _range(*ranges: str) -> dict[str, float]:
    """1 for BASE and for the blocks from one name to another, 0 for the others."""
    chosen = {"BASE"}
    for one in ranges:
        first, last = one.split("-")
        chosen |= set(ALL[ALL.index(first) : ALL.index(last) + 1])
    return {name: float(name in chosen) for name in ALL}


# Those of A1111's extension for block weights; where its 17 numbers have no block, that of the neighbours.
PRESETS = {
    "NONE": dict.fromkeys(ALL, 0.0),
    "ALL": dict.fromkeys(ALL, 1.0),
    "INS": _range("IN00-IN03"),
    "IND": _range("IN05-IN11"),
    "INALL": _range("IN00-IN11"),
    "MIDD": _range("IN05-IN11", "M00-M00", "OUT00-OUT06"),
    "OUTD": _range("OUT00-OUT06"),
    "OUTS": _range("OUT07-OUT11"),
    "OUTALL": _range("OUT00-OUT11"),
    "ALL0.5": dict.fromkeys(ALL, 0.5),
}
BLOCK = re.compile(r"\b(input|output)_blocks\.(\d+)\.")


def parse(text: str) -> dict[str, float]:
    """Weights by block. Raises `InputError` for an unknown preset, another count, and what is no finite number."""
    if text.upper() in PRESETS:
        return PRESETS[text.upper()]
    try:
        numbers = [float(one) for one in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in LAYOUTS or not all(map(math.isfinite, numbers)):
        raise InputError(
            f"block weights {short(text)}: expected {', '.join(map(str, LAYOUTS))} numbers joined by commas, or one of "
            f"{', '.join(PRESETS)}"
        )
    return dict(zip(LAYOUTS[len(numbers)], numbers, strict=True))


def block_of(layer: str) -> str:
    """The block of a layer, by LDM's name."""
    if "middle_block." in layer:
        return "M00"
    found = BLOCK.search(layer)
    return f"{'IN' if found[1] == 'input' else 'OUT'}{int(found[2]):02d}" if found else "BASE"


def weighted(lora: Lora, weights: dict[str, float]) -> Lora:
    """A LoRA with its layers scaled by block; layers of weight 0 are left out.

    Raises `InputError` if it changes a block that has no weight.
    """
    blocks = {name: block_of(name) for name in lora.layers}
    if unnamed := sorted(set(blocks.values()) - weights.keys()):
        raise InputError(
            f"{len(weights)} block weights have none for {', '.join(unnamed)}, which the LoRA changes: give "
            f"{next((count for count, names in LAYOUTS.items() if set(blocks.values()) <= set(names)), 26)} numbers"
        )
    layers = {name: one._replace(scale=one.scale * weights[blocks[name]]) for name, one in lora.layers.items()}
    return Lora({name: one for name, one in layers.items() if weights[blocks[name]]}, lora.tokens)
