"""The layers of a model that a LoRA can change: their names in each dialect, and their orders in nameless files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ldm.errors import InputError
from ldm.interchange.names import TEXT, UNET, layout_of, translate, unet_table
from ldm.models.building import untuned_model
from ldm.modules.adapters import tapped_blocks

LAYER_TYPES = (nn.Linear, nn.Conv2d)
NORM_TYPES = (nn.GroupNorm, nn.LayerNorm)
# Our classes with another name in diffusers. Published files use diffusers' names.
COUNTERPART = {
    "CrossAttention": "Attention",
    "ResBlock": "ResnetBlock2D",
    "SpatialTransformer": "Transformer2DModel",
}


def find_layers(
    root: nn.Module, classes: Collection[str], kinds: tuple[type, ...] = LAYER_TYPES
) -> dict[str, nn.Module]:
    """The linear and convolution layers inside modules of the named classes, each once, in the order of the modules.

    This is the search of the published LoRA code. Its files identify layers only by class and order.
    """
    found: dict[str, nn.Module] = {}
    # layers that tuning attached (position adapters, peft's factors) do not belong to the model itself
    adapters = tuple(f"{name}.{route.name}." for name, block in tapped_blocks(root) for route in block.routes)
    for prefix, module in root.named_modules():
        if type(module).__name__ in classes or COUNTERPART.get(type(module).__name__) in classes:
            for name, layer in module.named_modules(prefix=prefix):
                if isinstance(layer, kinds) and not f"{name}.".startswith(adapters or "\0") and ".lora_" not in name:
                    found.setdefault(name.removesuffix(".base_layer"), layer)
    return found


def parts(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """The two parts of a `LatentDiffusion` in such files, with the prefix of their names."""
    found = {"unet": (UNET, model.model.diffusion_model)}
    if isinstance(text := getattr(model.cond_stage_model, "transformer", None), nn.Module):
        found["text_encoder"] = (TEXT + "text_model.", text)
    return found


def layers_of(
    model: nn.Module,
    part: str,
    classes: Collection[str] | None = None,
    kinds: tuple[type, ...] = LAYER_TYPES,
) -> dict[str, torch.Size]:
    """Full names of a part's layers (those inside some classes, or all) with their weights' shapes, in LDM's order."""
    if part not in (known := parts(model)):
        return {}
    prefix, root = known[part]
    classes = {type(root).__name__} if classes is None else classes
    # transformers 5 has no level `text_model`; these are the names of released checkpoints
    return {
        prefix + name.removeprefix("text_model."): layer.weight.shape
        for name, layer in find_layers(root, classes, kinds).items()
    }


def skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The model of a config on the meta device: it has layers but no values, and takes no memory."""
    with torch.device("meta"):
        return untuned_model(config)


# --- dialects


def dialects(model: nn.Module, kinds: tuple[type, ...] = LAYER_TYPES) -> dict[str, dict[str, str]]:
    """LDM layer name -> name, for diffusers (`unet.…`, `text_encoder.…`) and kohya (`lora_unet_…`, `lora_te_…`)."""
    unet, text = (list(layers_of(model, part, kinds=kinds)) for part in ("unet", "text_encoder"))
    table = unet_table(layout_of(unet))
    theirs = {name: translate(name.removeprefix(UNET), table) for name in unet}
    diffusers = {name: f"unet.{other}" for name, other in theirs.items() if other}
    diffusers |= {name: "text_encoder." + name.removeprefix(TEXT) for name in text}
    kohya = {
        name: other.replace("unet.", "lora_unet_", 1).replace("text_encoder.", "lora_te_", 1).replace(".", "_")
        for name, other in diffusers.items()
    }
    return {"diffusers": diffusers, "kohya": kohya}


def names_in(model: nn.Module, names: Iterable[str], dialect: str) -> dict[str, str]:
    """LDM's names of some layers -> those of a dialect. Raises `InputError` for layers that the model has not."""
    table = dialects(model)[dialect]
    if lost := [name for name in names if name not in table]:
        raise InputError(
            f"this config's model has no layer {lost[0]} ({len(lost)} such): name the config of the base that the LoRA "
            "was made for with --config"
        )
    return {name: table[name] for name in names}


# --- orders. Sorts are stable, so LDM's own order decides between equal keys.

SECTIONS = ["conv_in", "time_embedding", "down_blocks", "up_blocks", "mid_block", "conv_norm_out", "conv_out"]
CHILDREN = ["attentions", "resnets", "downsamplers", "upsamplers"]
TEXT_LAYERS = ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"]


def _diffusers_order(name: str) -> tuple:
    """diffusers registers the up blocks before the middle one, and attentions before residual blocks."""
    section, *rest = name.removeprefix("unet.").split(".")
    level = int(rest.pop(0)) if rest and rest[0].isdigit() else 0
    child = CHILDREN.index(rest[0]) if rest and rest[0] in CHILDREN else 0
    number = int(rest[1]) if len(rest) > 1 and rest[1].isdigit() else 0
    return SECTIONS.index(section), level, child, number


def _later_diffusers_order(name: str) -> tuple:
    """In newer versions the feed-forward comes after the cross-attention."""
    inner = re.search(r"transformer_blocks\.(\d+)\.(attn1|attn2|ff)\.", name)
    if inner:
        return *_diffusers_order(name), int(inner[1]), ["attn1", "attn2", "ff"].index(inner[2])
    return *_diffusers_order(name), math.inf if name.endswith("proj_out") else -1, 0


ORDERS: dict[str, Callable[[str], tuple] | None] = {
    "diffusers": _diffusers_order,
    "ldm": None,
    "diffusers-new": _later_diffusers_order,
}


def in_order(model: nn.Module, part: str, classes: Collection[str], order: str) -> dict[str, torch.Size]:
    """A part's layers as a nameless file of the given order lists them: names and shapes."""
    found = layers_of(model, part, classes)
    if part == "text_encoder":
        keys = {name: (int(name.split(".layers.")[1].split(".")[0]), name.split(".")[-1]) for name in found}
        return dict(sorted(found.items(), key=lambda item: (keys[item[0]][0], TEXT_LAYERS.index(keys[item[0]][1]))))
    if (key := ORDERS[order]) is None:
        return found
    names = dialects(model)["diffusers"]
    return dict(sorted(found.items(), key=lambda item: key(names[item[0]])))
