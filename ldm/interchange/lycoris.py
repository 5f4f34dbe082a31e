"""Files of LyCORIS and of kohya's OFT, as ComfyUI and web UIs read them, and DoRA in diffusers' spelling.

A key is a layer, in any spelling that LoRA files have (`lora_keys`), and the name of a tensor: `hada_w1_a`, `lokr_w2`,
`oft_blocks`, `diff_b`, `dora_scale`, ... `alpha` divided by the rank scales the change; of a rotation it is a limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import refuse_not_finite, save_safetensors, weights_in
from ldm.errors import InputError, short
from ldm.interchange import bundled, lora_keys, packed, peft_config
from ldm.interchange import kinds as neutral
from ldm.interchange.formats import Codec, Context, Opened
from ldm.interchange.kinds import DORA, DOWN, FIXED, KINDS, UP, Kinds, Part
from ldm.interchange.layers import LAYER_TYPES, NORM_TYPES, dialects, unused
from ldm.interchange.lora import Lora
from ldm.modules.encoders.tokens import Vectors
from ldm.patterns import Patterns

# A learnt factor of an early version; LyCORIS multiplies it into another tensor now.
SCALAR = "scalar"
TENSORS = sorted(
    {name for row in KINDS.values() for need in (*row.needs, *row.may) for one in need.split("|")
     for name in one.split("+")} - {"oft_R", "boft_R", "boft_s", UP, DOWN} | {SCALAR},
    key=len, reverse=True,
)  # fmt: skip
# DoRA's magnitudes as diffusers and PEFT call them; the vector is that of the outputs.
MAGNITUDES = [f"lora_magnitude_vector{end}" for end in ("", ".weight", ".default", ".default.weight")]
# Tensors that plain LoRA has, too: alone they do not tell that a file is of these kinds.
PLAIN = {"weight", "alpha", UP, DOWN}
KOHYA_OFT = "oft_unet_"


def split(key: str) -> tuple[str, str] | None:
    """(layer, tensor) of a key; None if neither these files nor those of LoRA have such keys."""
    if found := lora_keys.split(key):
        layer, role = found
        return layer, {"up": UP, "down": DOWN}.get(role, role)
    if end := next((end for end in MAGNITUDES if key.endswith(f".{end}")), None):
        return key.removesuffix(f".{end}"), "magnitude"
    return next(((key.removesuffix(f".{name}"), name) for name in TENSORS if key.endswith(f".{name}")), None)


def is_lycoris(content: Any) -> bool:
    """Whether a file holds more than plain LoRA by the names of its tensors."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        return False
    held = {found[1] for key in content if (found := split(str(key)))}
    return bool(held - PLAIN - {SCALAR}) or (SCALAR in held and DOWN in held)


def read(file: Opened, names: Mapping[str, str] | None = None) -> Kinds:
    """The changes of a file by LDM's layer names or, without `names` (theirs -> LDM's), by the file's own.

    Raises `InputError` for unknown keys, and for tensors that are not finite or belong to no kind.
    """
    source = str(file.given)
    weights = weights_in(file.content, source)
    refuse_not_finite(weights, source)
    weights, words = bundled.taken_out(weights, source)
    grouped: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in weights.items():
        if (found := split(key)) is None:
            unknown.append(key)
        else:
            grouped.setdefault(found[0], {})[found[1]] = value
    plain = {layer: _spelled(layer) for layer in grouped}
    unknown += [layer for layer, name in plain.items() if names is not None and name not in names]
    if unknown:
        raise lora_keys.unknown_keys(source, unknown)
    trained = _Trained(file)
    parts = {layer: _part(layer, tensors, source, trained) for layer, tensors in grouped.items()}
    named = {layer: plain[layer] if names is None else names[plain[layer]] for layer in parts}
    if len(set(named.values())) < len(named):
        twice = next(layer for number, layer in enumerate(named) if named[layer] in list(named.values())[:number])
        raise InputError(f"{source} changes {named[twice]} twice, under two spellings, e.g. {short(twice)}")
    return Kinds({named[layer]: part for layer, part in parts.items()}, words)


def _spelled(layer: str) -> str:
    layer = layer.replace(KOHYA_OFT, "lora_unet_", 1) if layer.startswith(KOHYA_OFT) else layer
    return lora_keys.plain_name(layer)


class _Trained:
    """The scale of a LoRA without alpha: PEFT's configuration in diffusers' metadata, else 1."""

    def __init__(self, file: Opened) -> None:
        self.configurations = peft_config.configurations(file)
        for config in self.configurations.values():
            peft_config.refuse_changed_start(config, file)
        self.patterns = Patterns(f"{file.path}: PEFT's configuration is damaged")

    def scale(self, layer: str, rank: int) -> float:
        return peft_config.scale(lora_keys.plain_name(layer), rank, self.configurations, self.patterns)


def _part(layer: str, tensors: dict[str, Tensor], source: str, trained: _Trained) -> Part:
    tensors = dict(tensors)
    alpha, scalar = tensors.pop("alpha", None), tensors.pop(SCALAR, None)
    if "magnitude" in tensors:
        tensors[DORA] = tensors.pop("magnitude").flatten()
    if "on_input" not in tensors and "weight" in tensors:
        raise lora_keys.unknown_keys(source, [f"{layer}.weight"])
    part = neutral.part_of(layer, tensors, source)
    if part.kind in ("oft", "boft"):
        limit = neutral.finite_scale(alpha, 1, layer, source) if alpha is not None else 0.0
        return Part(part.kind, tensors, options={"alpha": limit, "kohya": layer.startswith(KOHYA_OFT)})
    rank = neutral.rank_of(part.kind, tensors)
    if alpha is None and part.kind == "lora":
        scale = trained.scale(layer, rank)
    else:
        scale = neutral.finite_scale(alpha, rank, layer, source)
    factor = neutral.finite_scale(scalar, 1, layer, source)
    return Part(part.kind, tensors, scale * factor)


# --- writing


def names_of(model: nn.Module) -> dict[str, str]:
    """LDM's names of a model's layers and norms -> kohya's."""
    return dialects(model, (*LAYER_TYPES, *NORM_TYPES))["kohya"]


def lookup(model: nn.Module) -> dict[str, str]:
    """Every spelling of a model's layers and norms -> LDM's name."""
    return lora_keys.lookup(model, (*LAYER_TYPES, *NORM_TYPES))


def write(path: Path, kinds: Kinds, context: Context) -> None:
    """Write a file for LyCORIS, ComfyUI and web UIs, with kohya's names of layers.

    Raises `InputError` for PEFT's rotations if there are no base weights: LyCORIS has no such rotation.
    """
    names, tensors, idle = names_of(context.model), {}, unused(context.model)
    computed = {layer: part for layer, part in kinds.layers.items() if not f"{layer}.".startswith(idle)}
    if foreign := [layer for layer in computed if layer not in names]:
        raise InputError(
            f"{context.source} changes {foreign[0]} ({len(foreign)} such), for which these files have no name"
        )
    for layer, part in computed.items():
        if part.kind in FIXED or part.options.get("with_bias"):
            part = _as_difference(layer, part, context)
        held = {name: value.detach() for name, value in part.tensors.items()}
        held |= _written(part, held)
        if DORA in held:
            held[DORA] = _magnitude(held[DORA], part)
        tensors |= {f"{names[layer]}.{name}": value.contiguous() for name, value in held.items()}
    tensors |= bundled.written(kinds.tokens) if context.bundles else {}
    save_safetensors(path, tensors, {"ss_network_module": "lycoris.kohya", "format": "pt"})


def _written(part: Part, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """alpha; where a kind has no rank to divide it by, the tensor that carries the scale instead."""
    if part.kind in ("oft", "boft"):
        alpha = float(part.options.get("alpha", 0.0))
        stopped = part.options.get("kohya") and not alpha  # LyCORIS takes 0 for no limit
        blocks = torch.zeros_like(held["oft_blocks"]) if stopped else held["oft_blocks"]
        return {"alpha": torch.tensor(alpha), "oft_blocks": blocks}
    if part.kind in ("full", "norm", "ia3", "oft-diag"):
        return {}
    rank = neutral.rank_of(part.kind, held)
    if rank is None:  # LoKr of two whole matrices, whose alpha every reader ignores
        return {"lokr_w1": held["lokr_w1"] * part.scale, "alpha": torch.tensor(1.0)}
    return {"alpha": torch.tensor(float(part.scale * rank))}


def _magnitude(magnitude: Tensor, part: Part) -> Tensor:
    """DoRA's magnitudes in LyCORIS's shape, [out, 1, ...]; those of inputs have it already."""
    if magnitude.dim() > 1:
        return magnitude
    outputs = next((part.tensors[name].dim() for name in (DOWN,) if name in part.tensors), 2)
    return magnitude.reshape(-1, *[1] * (outputs - 1))


def _as_difference(layer: str, part: Part, context: Context) -> Part:
    """The change of a part as a whole difference in half precision, from the base's weights."""
    if context.base is None:
        what = (
            f"holds {KINDS[part.kind].title}, which rotates the inputs of a layer, and LyCORIS's rotates the outputs"
            if part.kind in FIXED else "multiplies biases, too, by PEFT's (IA)3, and LyCORIS's does not"
        )  # fmt: skip
        raise InputError(
            f"{context.source} {what}: --to peft-kinds keeps it, and --base MODEL writes what it changes as whole "
            "differences"
        )
    base, outer = packed.split(context.base), f"{layer}."
    own = {name: value for name, value in base.items() if name.startswith(outer)}
    found = neutral.changes(Kinds({layer: part}), own, context.source)
    names = {"weight": "diff", "bias": "diff_b"}
    return Part("full", {names[name.removeprefix(outer)]: value.half() for name, value in found.items()})


def _kinds(file: Opened, context: Context) -> Kinds:
    return read(file, None if context.model is None else lookup(context.model))


def _lora(file: Opened, context: Context) -> Lora:
    return neutral.as_lora(_kinds(file, context), str(file.given))


def _words(file: Opened, _context: Context) -> Mapping[str, Vectors]:
    return lora_keys.words(file)


LYCORIS = Codec(lambda file: is_lycoris(file.content), {"kinds": _kinds, "lora": _lora, "words": _words}, write)
