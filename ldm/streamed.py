"""Floor 0: writes a `.safetensors` file tensor by tensor, so that a whole model never lies in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoints import atomic_write

# torch's types by the names of the format
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write(
    path: str | Path,
    described: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    value: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> None:
    """Write tensors of the described types and shapes, atomically; `value` computes each when its turn comes.

    Raises `WriteError` if the system refuses.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in described.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # the data begins at a multiple of eight
    with atomic_write(path) as beside, beside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in progress(list(described)):
            dtype, shape = described[name]
            tensor = value(name).detach().to("cpu", dtype).reshape(shape).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
