"""Layers that are rows of one matrix: q, k and v in OpenCLIP's text towers (`attn.in_proj_weight`, [3 d, d]).

Other programs change them one by one, so they are layers of their own in the neutral forms: `attn.q_proj`, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ldm.interchange.text_encoders import PACKED

WHOLE = re.compile(r"(.*\.attn\.)in_proj_(weight|bias)")
ROWS = re.compile(rf"(.*\.attn\.)({'|'.join(PACKED)})\.(weight|bias)")


def split(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name with those of q, k and v beside the matrices that hold them, as views."""
    found = dict(weights)
    for name, value in weights.items():
        if match := WHOLE.fullmatch(name):
            rows = zip(PACKED, value.detach().chunk(3), strict=True)
            found |= {f"{match[1]}{part}.{match[2]}": row for part, row in rows}
    return found


def rows(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name with those of q, k and v in place of the matrices that hold them."""
    return {name: value for name, value in split(weights).items() if not WHOLE.fullmatch(name)}


def holder(name: str) -> str:
    """The matrix that holds a weight of q, k or v of a tower of OpenCLIP; another name as it is."""
    match = ROWS.fullmatch(name)
    return f"{match[1]}in_proj_{match[3]}" if match else name


def joined(changes: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Changes by name with those of q, k and v in one matrix each, where that is how the weights are."""
    found: dict[str, Tensor] = {}
    for name, change in changes.items():
        whole = holder(name)
        if whole == name or whole not in weights:
            found[name] = change
        elif whole not in found:
            outer, _, kind = whole.partition("in_proj_")
            parts = [changes.get(f"{outer}{part}.{kind}") for part in PACKED]
            found[whole] = torch.cat([torch.zeros_like(change) if part is None else part for part in parts])
    return found
