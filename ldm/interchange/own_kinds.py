"""Reads the folders of our own trainings as changes of any kind (`kinds`): LoRA and its variants, and tuned weights.

Tuned base weights (a full UNet, norms, biases, cross-attention) are values, and files hold differences, so these need
the base model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ldm.errors import InputError
from ldm.interchange import own, packed
from ldm.interchange.formats import Context
from ldm.interchange.kinds import DORA, DOWN, UP, Kinds, Part, joined, part_of, rank_of
from ldm.interchange.layers import parts
from ldm.interchange.names import TEXT, UNET
from ldm.tuning import table
from ldm.tuning.lora import LoRA

# The end of a tensor's name in a folder -> its name in `kinds`.
TENSORS = {
    "lora_A": DOWN,
    "lora_B": UP,
    "lora_magnitude_vector": DORA,
    **{name: name for name in ("oft_R", "boft_R", "boft_s", "lokr_w1", "lokr_w2", "lokr_t2")},
    **{f"hada_{role}": f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_w{i}_{role}": f"lokr_w{i}_{role}" for i in (1, 2) for role in "ab"},
}
ADDED = re.compile(rf"\.({'|'.join(sorted(TENSORS, key=len, reverse=True))})\.default\w*(\.weight)?$")
# Options of peft's OFT that its math needs, with the defaults.
OFT = {"coft": False, "eps": 6e-5, "block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5}


def kinds(path: str | Path, context: Context) -> Kinds:
    """The changes and words of a folder.

    Raises `InputError` for position adapters, for tuned weights if the base model is not given, and if a layer is
    changed twice.
    """
    own.refuse_adapters(path, "no file of these kinds can hold")
    found = [Kinds({}, own.words(path))]
    for target, params, tensors in own.families(path):
        if own.inversion(target, params, tensors):
            continue
        if target == table.FAMILIES["lora"]:
            own.refuse_changed_base(family := LoRA(**params), path)
            found.append(Kinds(dict(_of_lora(family, tensors, str(path)))))
        else:
            found.append(Kinds(_of_weights(tensors, context, str(path))))
    return joined(found, str(path))


def _of_lora(family: LoRA, tensors: Mapping[str, Tensor], source: str) -> Iterator[tuple[str, Part]]:
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        end = ADDED.search(name)
        if end is None:
            raise InputError(f"{source} is damaged: {name} is no tensor of a LoRA")
        layers.setdefault(name[: end.start()], {})[TENSORS[end[1]]] = value
    for layer, held in layers.items():
        if DORA in held:
            held[DORA] = held[DORA].flatten()
        part = part_of(layer, held, source)
        if part.kind == "oft-peft":
            own_options = {name: family.options.get(name, default) for name, default in OFT.items()}
            yield layer, Part(part.kind, held, options={**own_options, "filters": True})
        else:
            yield layer, Part(part.kind, held, 1.0 if part.kind == "boft-peft" else _scale(family, layer, part, source))


def _scale(family: LoRA, layer: str, part: Part, source: str) -> float:
    """alpha / rank of a layer, for rsLoRA alpha / sqrt(rank)."""
    size = family.targets[[pattern for pattern in family.targets if fnmatchcase(layer, pattern)][-1]]
    if family.options.get("alpha_pattern") or family.options.get("rank_pattern"):
        raise InputError(
            f"{source}: its ranks or alphas are set by options of peft (rank_pattern, alpha_pattern), which is not "
            "written: set them by targets: {pattern: {rank, alpha}}"
        )
    alpha = size.get("alpha", size["rank"])
    rank = rank_of(part.kind, part.tensors) or size["rank"]
    return alpha / (rank**0.5 if family.kind == "rslora" or family.options.get("use_rslora") else rank)


def _of_weights(tensors: Mapping[str, Tensor], context: Context, source: str) -> dict[str, Part]:
    """Tuned base weights as differences from the base model's."""
    if context.base is None:
        raise InputError(
            f"{source} holds tuned base weights ({next(iter(tensors))}), and these files hold differences: add --base "
            "MODEL, the checkpoint or diffusers folder that it was trained on"
        )
    layers: dict[str, dict[str, Tensor]] = {}
    released, prefixes = packed.split(context.base), _prefixes(context.model)
    for name, value in packed.rows(tensors).items():
        layer, _, role = name.rpartition(".")
        base = released.get(name)
        if not name.startswith(prefixes) or role not in ("weight", "bias") or base is None:
            raise InputError(f"{source} tunes {name}, which no file of these kinds can hold")
        if base.shape != value.shape:
            raise InputError(
                f"{source} was made for another base model: {name} has {list(value.shape)}, the base has "
                f"{list(base.shape)}"
            )
        layers.setdefault(layer, {})[role] = value.float() - base.float()
    return {layer: _difference(held, released[f"{layer}.weight"]) for layer, held in layers.items()}


def _prefixes(model: nn.Module | None) -> tuple[str, ...]:
    """The prefixes of the UNet and of the text encoders; without a model those of Stable Diffusion v1."""
    return (UNET, TEXT) if model is None else tuple(prefix for prefix, _ in parts(model).values())


def _difference(held: Mapping[str, Tensor], weight: Tensor) -> Part:
    """Of a layer [out, in, ...], or of a norm, whose weight is a vector."""
    if weight.dim() == 1:
        names: dict[str, Any] = {"weight": "w_norm", "bias": "b_norm"}
        held = {"weight": weight.new_zeros(weight.shape), **held}  # readers look for both
        return Part("norm", {names[role]: value for role, value in held.items()})
    return Part("full", {{"weight": "diff", "bias": "diff_b"}[role]: value for role, value in held.items()})
