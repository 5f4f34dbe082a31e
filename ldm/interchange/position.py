"""Combines position adapters (arXiv 2303.18181): scales them, sums them within a route, or stacks them.

A bottleneck is not linear, so bottlenecks cannot be averaged tensor by tensor. But their weighted sum is one wider
bottleneck:

    sum_i w_i (U_i a(D_i x + b_i) + c_i) = [w_1 U_1, ...] a([D_1; ...] x + [b_1; ...]) + sum_i w_i c_i
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.modules.adapter_files import told_families
from ldm.modules.adapters import BLOCK_KINDS, FORMS
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.modules.folders import read_folder, write_folder

Folder = tuple[dict[str, Any], dict[str, Tensor]]  # adapter_config.json and the tensors
BLOCKS = {block.__name__: block for block in (BasicTransformerBlock, ResBlock)}
SAME = ("kind", "din", "dout", "method", "form", "blocks")  # what must agree for a sum


def read(path: str | Path) -> Folder:
    """A folder's description and tensors.

    Raises `InputError` for a folder that does not name its routes, and for one with other families, which would be
    lost.
    """
    folder = read_folder(path)
    if folder.config is None:
        raise InputError(
            f"{path} was written by the published code and does not name its routes: "
            "load it into a model with its config and save it again"
        )
    if folder.families:
        raise InputError(
            f"{path} holds more than position adapters ({', '.join(told_families(folder))}), which a merged folder "
            "would lack: sample.py takes several folders as they are, each with its --adapter_scale"
        )
    return folder.config, folder.adapters


def scaled(folder: Folder, strength: float) -> Folder:
    """The same adapters with another strength, which only changes the scales of the routes."""
    config, tensors = folder
    entries = [{**entry, "scale": entry["scale"] * strength} for entry in config["adapters"]]
    return {**config, "adapters": entries}, dict(tensors)


def stacked(folders: Sequence[Folder], strengths: Sequence[float]) -> Folder:
    """All adapters of several folders stacked in each block. Their outputs add up, whatever the routes."""
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    count = dict.fromkeys(BLOCK_KINDS, 0)
    for folder, strength in zip(folders, strengths, strict=True):
        config, own = scaled(folder, strength)
        for entry in config["adapters"]:
            number = count[entry["kind"]]
            name = BLOCKS[BLOCK_KINDS[entry["kind"]].block].adapter_name(number)
            count[entry["kind"]] += 1
            entries.append({**entry, "name": name})
            for block in entry["blocks"]:
                old, new = f"{block}.{entry['name']}.", f"{block}.{name}."
                tensors |= {new + key.removeprefix(old): v for key, v in own.items() if key.startswith(old)}
    return _described(folders, entries), tensors


def summed(folders: Sequence[Folder], weights: Sequence[float]) -> Folder:
    """sum_i weight_i * adapter_i of adapters with the same routes, as one adapter for each route; mid_dims add up.

    The result is exact. Raises `InputError` if routes or activations differ, and for residual-block adapters with
    different norms, because one form has one norm. Such adapters can be stacked.
    """
    _check_summable([config["adapters"] for config, _ in folders])
    entries, tensors = [], {}
    for column in zip(*(config["adapters"] for config, _ in folders), strict=True):
        factors = [weight * entry["scale"] for weight, entry in zip(weights, column, strict=True)]
        entries.append({**column[0], "scale": 1.0, "mid_dim": sum(entry["mid_dim"] for entry in column)})
        for block in column[0]["blocks"]:
            parts = [_below(own, f"{block}.{e['name']}.") for (_, own), e in zip(folders, column, strict=True)]
            joined = _side_by_side(parts, factors, column[0]["kind"], block)
            tensors |= {f"{block}.{column[0]['name']}.{name}": value for name, value in joined.items()}
    return _described(folders, entries), tensors


def _check_summable(listed: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Raises `InputError` unless all folders list the same routes and forms, and the forms can be summed."""
    first, *others = listed
    for other in others:
        if [[e.get(k) for k in SAME] for e in other] != [[e.get(k) for k in SAME] for e in first]:
            raise InputError(
                f"the adapters have different routes or forms ({_told(first)}; {_told(other)}): "
                "a sum needs the same, stacking does not"
            )
    if form := next((entry["form"] for entry in first if entry.get("form")), None):
        raise InputError(f"adapters of the form {form} cannot be summed, only stacked")


def _side_by_side(
    parts: Sequence[Mapping[str, Tensor]], factors: Sequence[float], kind: str, block: str
) -> dict[str, Tensor]:
    down, up = FORMS[BLOCK_KINDS[kind].form].layers
    joined = {name: value for name, value in parts[0].items() if not name.startswith((f"{down}.", f"{up}."))}
    for name, value in joined.items():  # the norm of a residual-block adapter
        if any(not torch.equal(value, other[name]) for other in parts[1:]):
            raise InputError(f"the adapters in {block} begin with different norms: they cannot be summed, only stacked")
    for name in (f"{down}.weight", f"{down}.bias"):
        joined[name] = torch.cat([part[name] for part in parts])
    pairs = list(zip(factors, parts, strict=True))
    joined[f"{up}.weight"] = torch.cat([factor * part[f"{up}.weight"] for factor, part in pairs], dim=1)
    joined[f"{up}.bias"] = sum(factor * part[f"{up}.bias"] for factor, part in pairs)
    return joined


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _told(entries: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{e['din']}-{e['dout']} ({e.get('method', '?')})" for e in entries)


def _described(folders: Sequence[Folder], entries: list[dict[str, Any]]) -> dict[str, Any]:
    bases = {config.get("base_fingerprint") for config, _ in folders}
    if len(bases) > 1:
        raise InputError("the adapters were trained on different base models: their sum means nothing on either")
    return {"format": folders[0][0].get("format"), "adapters": entries, "base_fingerprint": bases.pop()}


def write(path: str | Path, folder: Folder) -> None:
    """Write a folder that `load_adapter_from_dir` reads, atomically."""
    write_folder(path, *folder)
