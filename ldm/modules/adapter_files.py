"""Writes the position adapters of a UNet to a folder (`ldm.modules.folders`), and reads them; `.pt` folders too."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import fingerprint
from ldm.errors import InputError, short
from ldm.modules.adapters import BLOCK_KINDS, ENTRY, check_entry, new_form, tapped_blocks
from ldm.modules.folders import Folder, read_folder, write_folder
from ldm.modules.taps import Route, TappedBlock

log = logging.getLogger(__name__)

SMALL = 2**20  # smaller claims are not checked, because later checks give better messages
COMPARED = ("kind", "din", "dout", "mid_dim", "method", "form")  # keys that must agree between a folder and a model
PACKAGES = ("torch", "pytorch-lightning", "transformers", "position-adapters-ldm")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of all adapters by their names in the UNet's state dict."""
    prefixes = tuple(f"{prefix}.{route.name}." for prefix, block in tapped_blocks(model) for route in block.routes)
    return {name: value for name, value in model.state_dict().items() if name.startswith(prefixes)} if prefixes else {}


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """The adapters of a model: one entry for each name and scale, with route, form and blocks."""
    entries: dict[tuple[str, float], dict] = {}
    for kind in BLOCK_KINDS:
        for prefix, block in tapped_blocks(model, kind):
            for route in block.routes:
                entry = {
                    "kind": kind,
                    "name": route.name,
                    "din": route.reads,
                    "dout": route.writes,
                    "scale": float(route.scale),
                }
                entry |= getattr(getattr(block, route.name), "config", {})
                entries.setdefault((route.name, entry["scale"]), {**entry, "blocks": []})["blocks"].append(prefix)
    return list(entries.values())


def check_base(config: Mapping[str, Any], fingerprint: str | None, source: str) -> None:
    """Warn if a folder was trained on a UNet with another fingerprint."""
    if config.get("base_fingerprint") not in (None, fingerprint):
        log.warning("%s was trained on another base model (fingerprint %s)", source, config["base_fingerprint"])


def own_fingerprint(model: nn.Module) -> str | None:
    """The digest of a UNet's base weights; only position adapters may have been added to it."""
    adapters = adapter_tensors(model)
    return fingerprint({name: value for name, value in model.state_dict().items() if name not in adapters})


def save(model: nn.Module, path: str | Path, notes: Mapping[str, Any]) -> None:
    """Write the adapters of a UNet as a folder, atomically. `notes` (step, class word, ...) go into the JSON."""
    entries = describe(model)
    if not entries:
        raise InputError("this model has no adapters to save; give it an adapter_config")
    write_folder(path, metadata(entries, notes, own_fingerprint(model)), adapter_tensors(model))


def metadata(entries: list[dict], notes: Mapping[str, Any], base_fingerprint: str | None) -> dict[str, Any]:
    """The JSON of a folder without its tensors: adapters, notes, the base and the packages."""
    return {
        "format": "position-adapters-1",
        "adapters": entries,
        **notes,
        "base_fingerprint": base_fingerprint,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load(model: nn.Module, path: str | Path, scale: float = 1.0, add: bool = False) -> None:
    """Put the adapters of a folder into a UNet: all of them or, with an `InputError`, none.

    A model without adapters takes those of the folder. A model with adapters must have the same ones; with `add`, those
    of the folder are attached beside them. A folder of the published code does not name its routes, so the model must
    have them. `scale` multiplies the scale of each route. A folder with other families too is refused, because they
    need a whole model; use `ldm.tuning.files.load`.
    """
    folder = read_folder(path)
    if folder.families:
        raise InputError(
            f"{path} holds more than position adapters ({', '.join(told_families(folder))}), which a UNet alone cannot "
            "take: give it to sample.py --adapter_path or ldm.tuning.files.load, which load all of it"
        )
    if folder.config:
        check_base(folder.config, own_fingerprint(model), str(path))
    put(model, folder, scale, add)


def told_families(folder: Folder) -> list[str]:
    """The names of the families in a folder."""
    return [str(entry.get("family", entry.get("target"))) for entry in folder.families]


def put(model: nn.Module, folder: Folder, scale: float = 1.0, add: bool = False) -> None:
    """`load` for a folder that has been read. Other content of the folder is ignored."""
    path, config, tensors = folder.path, folder.config, folder.adapters
    present = describe(model)
    if config is None and (add or not present):
        raise InputError(
            f"{path} was written by the published code and does not name its routes: use the config it was trained with"
        )
    if config and (add or not present):
        _attach_and_fill(model, config["adapters"], tensors, scale, str(path))
        return
    if config:
        _check_same_routes(present, config["adapters"], str(path))
    _fill(model, tensors, str(path), {entry["name"] for entry in present})
    scales = {entry["name"]: entry["scale"] for entry in (config["adapters"] if config else present)}
    for _, block in tapped_blocks(model):
        block.routes = tuple(Route(r.name, r.reads, r.writes, scales[r.name] * scale) for r in block.routes)


def _check_same_routes(present: list[dict], found: list[dict], source: str) -> None:
    def listing(entries: list[dict]) -> str:
        return ", ".join(
            "{din}-{dout} ({method}, mid_dim {mid_dim})".format(**{"method": "?", "mid_dim": "?", **e}) for e in entries
        )

    def compared(entries: list[dict]) -> list[tuple]:
        return sorted((e["name"], *(str(e.get(key)) for key in COMPARED)) for e in entries)

    if compared(present) != compared(found):
        raise InputError(
            f"{source} holds the adapters {listing(found)}, this model has {listing(present)}; "
            "use the config it was trained with"
        )


def _attach_and_fill(
    model: nn.Module, entries: list[dict], tensors: dict[str, Tensor], scale: float, source: str
) -> None:
    blocks = dict(tapped_blocks(model))
    attached: list[tuple[TappedBlock, str]] = []
    renamed: dict[str, Tensor] = {}
    seen: set[str] = set()
    try:
        for entry in entries:
            checked = _checked(entry, source)
            for prefix in entry["blocks"]:
                if prefix not in blocks:
                    raise InputError(
                        f"{source} does not fit this model, which has no block {prefix} for its adapter"
                    )
                old = f"{prefix}.{entry['name']}."
                own = {key.removeprefix(old): value for key, value in tensors.items() if key.startswith(old)}
                if not own or old in seen:
                    raise InputError(f"{source} is damaged: no tensors of its own for an adapter in {short(prefix)}")
                seen.add(old)
                form = _form_of(checked, blocks[prefix], own, f"{source} does not fit this model: an adapter", prefix)
                like, name = next(model.parameters()), blocks[prefix].next_adapter_name()
                form = form.to(like.device, like.dtype)
                blocks[prefix].attach(name, form, checked["din"], checked["dout"], checked["scale"] * scale)
                attached.append((blocks[prefix], name))
                renamed |= {f"{prefix}.{name}.{key}": value for key, value in own.items()}
        _fill(model, renamed, source, only={name for _, name in attached})
    except Exception:
        for block, name in attached:
            block.detach(name)
        raise


def _checked(entry: dict, source: str) -> dict:
    """An entry of a folder as an entry of `adapter_config`. Raises `InputError`."""
    kind = entry["kind"]
    if kind not in BLOCK_KINDS:
        raise InputError(f"{source} holds an adapter of the unknown kind {kind!r}: expected {', '.join(BLOCK_KINDS)}")
    return check_entry(kind, {key: entry[key] for key in ENTRY if key in entry})


def _form_of(entry: dict, block: TappedBlock, own: Mapping[str, Tensor], what: str, prefix: str) -> nn.Module:
    """A form for a block. Raises `InputError` if it would have more numbers than `own`, its tensors in the folder."""
    reads, writes = entry["din"], entry["dout"]
    block.check_route(reads, writes)
    width = block.width(reads), block.width(writes)
    with torch.device("meta"):  # its size, without the memory
        claimed = sum(value.numel() for value in new_form(entry, *width).parameters())
    if claimed > max(sum(value.numel() for value in own.values()), SMALL):
        raise InputError(
            f"{what} with mid_dim {entry['mid_dim']} in {short(prefix)} has more numbers than its tensors, whose "
            f"shapes are {short([list(value.shape) for value in own.values()])}"
        )
    return new_form(entry, *width)


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], source: str, only: set[str]) -> None:
    own = {name: value for name, value in adapter_tensors(model).items() if only & set(name.split("."))}
    problems = {
        "are missing from it": sorted(own.keys() - tensors.keys()),
        "are not in this model": sorted(tensors.keys() - own.keys()),
        "have another shape": [
            f"{n} {list(t.shape)}, here {list(own[n].shape)}"
            for n, t in tensors.items()
            if n in own and t.shape != own[n].shape
        ],
    }
    for problem, names in problems.items():
        if names:
            raise InputError(
                f"{source} does not fit this model: {len(names)} tensors {problem}, e.g. {', '.join(names[:3])}"
            )
    for name, value in tensors.items():
        own[name].copy_(value)
