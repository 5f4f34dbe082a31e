"""LoRA files that name their layers: diffusers and PEFT (`unet.….lora_A.weight`), kohya (`….lora_down.weight`).

All spellings are read by one table: what a key ends in says its role, what is before it names the layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints import read_weights, save_safetensors
from ldm.interchange.cloneofsimo import metadata_of
from ldm.interchange.layers import dialects
from ldm.interchange.lora import Factors, Lora, fitted, folded
from ldm.interchange.names import UNET
from ldm.util import InputError

# Ends of keys: of PEFT and recent diffusers, of kohya, of earlier diffusers' text encoder, layers and processors.
ROLES = {
    "down": [".lora_A.weight", ".lora_A.default.weight", ".lora_down.weight"],
    "up": [".lora_B.weight", ".lora_B.default.weight", ".lora_up.weight"],
    "alpha": [".alpha"],
}
for _old in (".lora_linear_layer", ".lora", "_lora"):
    ROLES["down"].append(f"{_old}.down.weight")
    ROLES["up"].append(f"{_old}.up.weight")
ENDS = sorted(((end, role) for role, ends in ROLES.items() for end in ends), key=lambda item: -len(item[0]))


def split(key: str) -> tuple[str, str] | None:
    """(layer, role) of a key; None if no LoRA file has such keys."""
    return next(((key.removesuffix(end), role) for end, role in ENDS if key.endswith(end)), None)


def is_keyed(keys) -> bool:
    """Whether the names of a file's tensors are those of a LoRA that names its layers."""
    return any((found := split(key)) and found[1] != "alpha" for key in keys)


def kind(keys) -> str:
    """`kohya` or `diffusers`, by the first key."""
    return "kohya" if any(key.startswith(("lora_unet_", "lora_te_")) for key in keys) else "diffusers"


def raw(path: str | Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by layer, as the file calls it, and role. Raises `InputError` for keys that are none."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in read_weights(path).items():
        if (parts := split(key)) is None:
            unknown.append(key)
        else:
            found.setdefault(parts[0], {})[parts[1]] = value
    unknown += [layer for layer, roles in found.items() if not {"up", "down"} <= roles.keys()]
    if unknown:
        raise _unknown(path, unknown)
    return found


def _unknown(path: str | Path, keys: list[str]) -> InputError:
    return InputError(f"{path}: {len(keys)} unknown keys, e.g. {', '.join(keys[:3])}; wrong base model or format?")


def read(path: str | Path, model: nn.Module) -> Lora:
    """Read a LoRA of any of these spellings for a model. Raises `InputError` for unknown keys and another base model.

    Without an alpha the scale is 1, as in diffusers; alphas of PEFT's configuration in the metadata are heeded.
    """
    found, known = raw(path), _lookup(model)
    if unknown := [layer for layer in found if plain_name(layer) not in known]:
        raise _unknown(path, unknown)
    alphas, shapes = peft_alphas(path, model), model.state_dict()
    layers = {}
    for layer, roles in found.items():
        name, down = known[plain_name(layer)], roles["down"]
        alpha = float(roles["alpha"]) if "alpha" in roles else alphas(name, len(down))
        factors = Factors(down, roles["up"], alpha / len(down))
        layers[name] = fitted(factors, shapes[f"{name}.weight"].shape, name, str(path))
    return Lora(layers)


def plain_name(layer: str) -> str:
    """A layer as diffusers calls it now: without PEFT's wrapping, attention processors and a missing `.0`."""
    layer = layer.removeprefix("base_model.model.").replace(".processor.", ".")
    return re.sub(r"\.to_out$", ".to_out.0", layer)


def _lookup(model: nn.Module) -> dict[str, str]:
    """Every way in which LoRA files call a layer -> LDM's name."""
    names = dialects(model)
    unet = [name for name in names["diffusers"] if name.startswith(UNET)]
    table = {"lora_unet_" + name.removeprefix(UNET).replace(".", "_"): name for name in unet}
    for ours, theirs in names["diffusers"].items():
        table |= {theirs.removeprefix("unet."): ours, theirs.replace("text_model.", "", 1): ours}
    for dialect in names.values():
        table |= {theirs: ours for ours, theirs in dialect.items()}
    return table


def peft_alphas(path: str | Path, model: nn.Module) -> Callable[[str, int], float]:
    """(layer, rank) -> alpha by the configuration of PEFT in the metadata; without one, the rank."""
    try:
        about = json.loads(metadata_of(path).get("lora_adapter_metadata", "{}"))
    except ValueError:
        about = {}
    names = dialects(model)["diffusers"] if about else {}

    def alpha(name: str, rank: int) -> float:
        part, _, rest = names.get(name, "").partition(".")
        patterns = about.get(f"{part}.alpha_pattern") or {}
        fitting = (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?{key}", rest))
        return float(next(fitting, about.get(f"{part}.lora_alpha", rank)))

    return alpha


def write_diffusers(path: str | Path, lora: Lora, model: nn.Module) -> None:
    """Write what diffusers' `load_lora_weights` reads. The scale goes into `up`: the format has no alpha of its own."""
    names = dialects(model)["diffusers"]
    tensors = {}
    for name, factors in lora.layers.items():
        down, up, _ = folded(factors)
        tensors |= {f"{names[name]}.lora_A.weight": down, f"{names[name]}.lora_B.weight": up}
    save_safetensors(path, tensors, {"format": "pt"})


def write_kohya(path: str | Path, lora: Lora, model: nn.Module) -> None:
    """Write what web UIs read: factors as they are and alpha = scale * rank."""
    names = dialects(model)["kohya"]
    tensors = {}
    for name, factors in lora.layers.items():
        stem, alpha = names[name], torch.tensor(float(factors.scale * factors.rank))
        tensors |= {
            f"{stem}.lora_down.weight": factors.down,
            f"{stem}.lora_up.weight": factors.up,
            f"{stem}.alpha": alpha,
        }
    save_safetensors(path, tensors, {"ss_network_module": "networks.lora", "format": "pt"})
