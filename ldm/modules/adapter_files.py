"""Position adapters as a folder, `adapters.safetensors` and `adapter_config.json`; published `.pt` folders too."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import atomic_write, fingerprint, is_adapter, is_added, read_weights, save_json, save_safetensors
from ldm.errors import InputError
from ldm.modules.adapters import ENTRY, FORMS, KINDS, check_entry, tapped_blocks
from ldm.modules.taps import Route, TappedBlock

log = logging.getLogger(__name__)

TENSORS, CONFIG = "adapters.safetensors", "adapter_config.json"
COMPARED = ("kind", "din", "dout", "mid_dim", "method")  # what must agree between a folder and a model
PACKAGES = ("torch", "pytorch-lightning", "transformers", "position-adapters-ldm")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of all adapters by their names in the UNet's state dict."""
    return {name: value for name, value in model.state_dict().items() if is_adapter(name)}


def describe(model: nn.Module) -> list[dict[str, Any]]:
    """The adapters of a model: one entry for each name, with its route, form and the blocks that it sits in."""
    entries: dict[str, dict] = {}
    for kind in KINDS:
        for prefix, block in tapped_blocks(model, kind):
            for route in block.routes:
                entry = {
                    "kind": kind,
                    "name": route.name,
                    "din": route.reads,
                    "dout": route.writes,
                    "scale": route.scale,
                }
                entry |= getattr(getattr(block, route.name), "config", {})
                entries.setdefault(route.name, {**entry, "blocks": []})["blocks"].append(prefix)
    return list(entries.values())


def base_fingerprint(model: nn.Module, changed: Container[str] = ()) -> str | None:
    """A digest of the frozen weights of a UNet that was tuned; None if all are `changed`, that is, tuned themselves."""
    if hasattr(model, "released_fingerprint"):
        return model.released_fingerprint
    state = model.state_dict()
    frozen = {name: value for name, value in state.items() if not is_added(name) and name not in changed}
    return fingerprint(frozen) if frozen else None


def half_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the frozen weights of a UNet into `dtype`; what learns stays in fp32. The digest remains that of before."""
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.released_fingerprint = base_fingerprint(model, learning)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def check_base(model: nn.Module, config: Mapping[str, Any], source: str) -> None:
    """Warn if what a folder holds was trained on another UNet than this one."""
    tuned = [name for family in config.get("families", []) for name in family["tensors"]]
    changed = {name.removeprefix("model.diffusion_model.") for name in tuned}
    if config.get("base_fingerprint") not in (None, base_fingerprint(model, changed)):
        log.warning("%s was trained on another base model (fingerprint %s)", source, config["base_fingerprint"])


def save(model: nn.Module, path: str | Path, notes: Mapping[str, Any]) -> None:
    """Write the adapters of a UNet as a folder, atomically. `notes` (step, class word, ...) go into the JSON."""
    entries = describe(model)
    if not entries:
        raise InputError("this model has no adapters to save; give it an adapter_config")
    write(path, adapter_tensors(model), about(model, entries, notes))


def write(path: str | Path, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
    """Write a folder of adapters from its tensors and what its JSON tells, atomically."""
    with atomic_write(path) as beside:
        beside.mkdir()
        save_safetensors(beside / TENSORS, tensors)
        save_json(beside / CONFIG, told)


def about(
    model: nn.Module, entries: list[dict], notes: Mapping[str, Any], changed: Container[str] = ()
) -> dict[str, Any]:
    """What the JSON of a folder says beside its tensors: adapters, notes, the base and the packages."""
    return {
        "format": "position-adapters-1",
        "adapters": entries,
        **notes,
        "base_fingerprint": base_fingerprint(model, changed),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_config(path: str | Path) -> dict[str, Any] | None:
    """The `adapter_config.json` of a folder; None for a folder of the published code, which has none."""
    file = Path(path) / CONFIG
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
        for entry in config["adapters"]:
            entry["kind"], entry["name"], entry["din"], entry["dout"], entry["blocks"], float(entry["scale"])
        for family in config.get("families", []):
            family["target"], family["params"], list(family["tensors"])
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged ({error!r}); expected what save_adapter_to_dir writes") from None
    return config


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The adapter tensors of a folder by their names in the UNet, from either format. Raises `InputError`."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"adapter folder {path} does not exist; expected one that training wrote, such as checkpoints/500-adapters"
        )
    if (path / TENSORS).is_file():
        return read_weights(path / TENSORS)
    files = sorted(path.glob("*.pt"))
    if not files:
        raise InputError(f"adapter folder {path} holds neither {TENSORS} nor the .pt files of the published code")
    tensors: dict[str, Tensor] = {}
    for (
        file
    ) in files:  # a transformer adapter is there twice, as `<name>.pt` and `<name>.adp.pt`, with the same full names
        tensors |= {f"{file.stem}.{key}": value for key, value in read_weights(file).items()}
    return tensors


def load(model: nn.Module, path: str | Path, scale: float = 1.0, add: bool = False) -> None:
    """Put the adapters of a folder into a UNet; all of them or, with an `InputError`, none.

    A model without adapters takes those of the folder. One that has some must have the same, unless `add`: then those
    of the folder are attached beside them. A folder of the published code does not say what its routes are, so the
    model must have them. `scale` multiplies the scale of each route.
    """
    config, tensors = read_config(path), read_tensors(path)
    present = describe(model)
    if config is None and (add or not present):
        raise InputError(
            f"{path} was written by the published code and does not name its routes: use the config it was trained with"
        )
    if config:
        check_base(model, config, str(path))
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
    def told(entries: list[dict]) -> str:
        return ", ".join(
            "{din}-{dout} ({method}, mid_dim {mid_dim})".format(**{"method": "?", "mid_dim": "?", **e}) for e in entries
        )

    def compared(entries: list[dict]) -> list[tuple]:
        return sorted((e["name"], *(str(e.get(key)) for key in COMPARED)) for e in entries)

    if compared(present) != compared(found):
        raise InputError(
            f"{source} holds the adapters {told(found)}, this model has {told(present)}; "
            "use the config it was trained with"
        )


def _attach_and_fill(
    model: nn.Module, entries: list[dict], tensors: dict[str, Tensor], scale: float, source: str
) -> None:
    blocks = dict(tapped_blocks(model))
    attached: list[tuple[TappedBlock, str]] = []
    try:
        renamed: dict[str, Tensor] = {}
        for entry in entries:
            kind = entry["kind"]
            if kind not in FORMS:
                raise InputError(f"{source} holds an adapter of the unknown kind {kind!r}: expected {', '.join(FORMS)}")
            checked = check_entry(kind, {key: entry[key] for key in ENTRY if key in entry})
            for prefix in entry["blocks"]:
                if prefix not in blocks:
                    raise InputError(
                        f"{source} does not fit this model: it wants an adapter in {prefix}, which this model has not"
                    )
                block = blocks[prefix]
                name = block.next_adapter_name()
                reads, writes = checked["din"], checked["dout"]
                block.check_route(reads, writes)
                width = block.width(reads), block.width(writes)
                form = FORMS[kind](*width, checked["mid_dim"], checked["method"], checked["init"])
                like = next(model.parameters())
                block.attach(name, form.to(like.device, like.dtype), reads, writes, checked["scale"] * scale)
                attached.append((block, name))
                old, new = f"{prefix}.{entry['name']}.", f"{prefix}.{name}."
                renamed |= {new + key.removeprefix(old): value for key, value in tensors.items() if key.startswith(old)}
        if len(renamed) != len(tensors):
            raise InputError(
                f"{source}: {len(tensors) - len(renamed)} of its tensors belong to no adapter of its {CONFIG}"
            )
        _fill(model, renamed, source, only={name for _, name in attached})
    except Exception:
        for block, name in attached:
            block.detach(name)
        raise


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
