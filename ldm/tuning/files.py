"""Saves all trained parameters of a model in one folder, and loads such a folder onto a base model.

`adapter_config.json` names the families (`ldm.tuning.table`) with their parameters and tensors. Position adapters lie
in `adapters.safetensors` as `ldm.modules.adapter_files` has them, the tensors of all others in `tuned.safetensors`
(`ldm.modules.folders`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.modules import adapter_files
from ldm.modules.folders import TUNED, read_folder, write_folder  # noqa: F401 (TUNED is imported from here)
from ldm.tuning import UNET, Chosen, Tuning, choose, table, unet_fingerprint


def save(model: nn.Module, folder: str | Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write the trained parameters of all families, atomically. `notes` (step, class word, ...) go into the JSON.

    Raises `InputError` if the model is not tuned or a value is not finite; then an older folder stays.
    """
    unet = model.model.diffusion_model
    adapters = adapter_files.describe(unet)
    in_adapters = {UNET + name for name in adapter_files.adapter_tensors(unet)}
    tensors: dict[str, Tensor] = {}
    entries = []
    for chosen, learnt in model.tuning.by_family():
        if hasattr(chosen.family, "in_folder"):
            learnt = {name: learnt[name] for name in chosen.family.in_folder(model) if name in learnt}
        own = {name: value for name, value in learnt.items() if name not in in_adapters}
        if own and model.is_tuned:
            name = {"family": table.name_of(chosen.target), "target": chosen.target}  # the target is for older readers
            entries.append({**name, "params": chosen.params, "tensors": list(own)})
            tensors |= own
    if not adapters and not entries:
        raise InputError("nothing was tuned in this model: give it an adapter_config, a train_level or tuning")
    metadata = adapter_files.metadata(adapters, dict(notes or {}), model.tuning.fingerprint)
    if entries:
        metadata["families"] = entries
    write_folder(folder, metadata, adapter_files.adapter_tensors(unet) if adapters else {}, tensors)


def load(model: nn.Module, folder: str | Path, scale: float = 1.0, add: bool = False) -> None:
    """Load a folder onto a model with base weights. It may be a folder of the published code.

    `scale` is its strength: it multiplies the scale of position adapters and LoRA, and the change of base weights; it
    has no effect on words. If the model has the same family already, the folder fills it; with `add`, the folder's
    family is installed beside it. Raises `InputError` if the folder does not fit; then the model is as before. Also
    raises it for an unknown family that the user has not allowed, before anything is imported.
    """
    held = read_folder(folder)
    own = [one.target for one in model.tuning.families]
    entries = [{**entry, "target": table.target_in(entry, str(folder), own)} for entry in held.families]
    unet, tensors, tuning = model.model.diffusion_model, held.tuned, model.tuning
    if entries and not model.is_tuned:
        settle(model)
    if held.config:
        state = {**model.state_dict(), **tuning.released}
        base = {name: value for name, value in state.items() if tuning.is_base(name)}
        adapter_files.check_base(held.config, unet_fingerprint(base, changed=tensors), str(folder))
    added = [_installed(model, entry, tensors, scale, add, str(folder)) for entry in entries]  # without effect yet
    if held.config is None or held.config["adapters"]:
        adapter_files.put(unet, held, scale, add)
    for entry, (chosen, own) in zip(entries, added, strict=True):
        _fill(tuning, own, [tensors[name] for name in entry["tensors"]], scale)
        tuning.families += [chosen] if all(chosen is not one for one in tuning.families) else []


def settle(model: nn.Module) -> None:
    """Make a model a base to tune: it takes its averaged weights, and all parameters are frozen."""
    if model.use_ema:
        model.model_ema.copy_to(model.model)
        model.use_ema = False
    model.tuning.families, model.is_tuned = [], True
    model.requires_grad_(False)


def _installed(
    model: nn.Module, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], scale: float, add: bool, source: str
) -> tuple[Chosen, dict[str, nn.Parameter]]:
    """Install the family of an entry at this strength, with untrained values. Returns its parameters in file order."""
    same = [one for one in model.tuning.families if (one.target, one.params) == (entry["target"], entry["params"])]
    if same and not add:
        chosen = same[0]
    else:
        chosen = choose({"target": entry["target"], "params": entry["params"]})
        claimed = chosen.family.adds(model, source) if hasattr(chosen.family, "adds") else 0
        there = sum(tensors[name].numel() for name in entry["tensors"])
        if claimed > max(there, adapter_files.SMALL):
            raise InputError(
                f"{source} does not fit its tensors: by its parameters {chosen.target} has at least {claimed} numbers, "
                f"its tensors have {there}"
            )
        chosen.family.install(model)
    own = _matched(chosen, model, {name: tensors[name] for name in entry["tensors"]}, source)
    if hasattr(chosen.family, "strength"):
        chosen.family.strength(model, scale)
    return chosen, own


@torch.no_grad()
def _fill(tuning: Tuning, own: Mapping[str, nn.Parameter], values: list[Tensor], scale: float) -> None:
    """Put values into parameters. Added parameters take them; base weights move towards them by the strength."""
    released = tuning.remember(own)
    for (name, parameter), value in zip(own.items(), values, strict=True):
        value = value.to(parameter.device, parameter.dtype)
        start = released.get(name)
        alone = start is None or (scale == 1 and torch.equal(parameter, start))
        # Not in place: the released value is kept, and it may be mapped from a checkpoint's file.
        parameter.data = value.clone() if alone else parameter + scale * (value - start)


def _matched(chosen: Chosen, model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> dict[str, nn.Parameter]:
    """The parameters of a family in the order of its tensors. The numbers of families in the names may differ."""
    own = chosen.family.trainable(model)
    if own.keys() == tensors.keys():
        own = {name: own[name] for name in tensors}
    if len(own) != len(tensors):
        raise InputError(
            f"{source} does not fit this model: {chosen.target} has {len(tensors)} tensors there, {len(own)} here; "
            "use the base model that it was trained on"
        )
    for (name, parameter), (theirs, value) in zip(own.items(), tensors.items(), strict=True):
        if parameter.shape != value.shape:
            raise InputError(
                f"{source} does not fit this model: {theirs} has shape {list(value.shape)}, here {name} has "
                f"{list(parameter.shape)}; use the base model that it was trained on"
            )
    return own
