"""The layers of a model that a LoRA can change: their names in each dialect, and their orders in nameless files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ldm.errors import InputError
from ldm.interchange import packed
from ldm.interchange.names import UNET, layout_of, translate, unet_table
from ldm.interchange.text_encoders import BLOCKS, PACKED, layer_name
from ldm.models.building import untuned_model
from ldm.modules.adapters import tapped_blocks
from ldm.modules.encoders.open_clip import OpenCLIPText, TextTower

TEXT_PARTS = ("text_encoder", "text_encoder_2")
LAYER_TYPES = (nn.Linear, nn.Conv2d)
NORM_TYPES = (nn.GroupNorm, nn.LayerNorm)
# Our classes with another name in diffusers. Published files use diffusers' names.
COUNTERPART = {
    "CrossAttention": "Attention",
    "ResBlock": "ResnetBlock2D",
    "SpatialTransformer": "Transformer2DModel",
    "Attention": "CLIPAttention",
    "MLP": "CLIPMLP",
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
    """The parts of a model in such files, with the prefix of their names: the UNet and one or two text encoders."""
    found = {"unet": (UNET, model.model.diffusion_model)}
    for part, (name, encoder) in zip(TEXT_PARTS, _text_encoders(model).items(), strict=False):
        if isinstance(encoder, OpenCLIPText):
            found[part] = (f"{name}.model.", encoder.model)
        else:
            found[part] = (f"{name}.transformer.text_model.", encoder.transformer)
    return found


def _text_encoders(model: nn.Module) -> dict[str, nn.Module]:
    """The text encoders of a model that have layers, by their names."""
    known = getattr(model, "text_encoders", dict)()
    return {
        name: one
        for name, one in known.items()
        if isinstance(one, OpenCLIPText) or isinstance(getattr(one, "transformer", None), nn.Module)
    }


def layers_of(
    model: nn.Module,
    part: str,
    classes: Collection[str] | None = None,
    kinds: tuple[type, ...] = LAYER_TYPES,
) -> dict[str, torch.Size]:
    """Full names of a part's layers (those inside some classes, or all) with their weights' shapes, in LDM's order.

    OpenCLIP's q, k and v, which are rows of one matrix, are layers of their own, see `packed`. Layers that the model
    does not compute are left out.
    """
    if part not in (known := parts(model)):
        return {}
    prefix, root = known[part]
    classes = {type(root).__name__} if classes is None else classes
    unused, found = _unused(model, prefix), {}
    # transformers 5 has no level `text_model`; these are the names of released checkpoints
    for name, layer in find_layers(root, classes, kinds).items():
        name = prefix + name.removeprefix("text_model.")
        if name.startswith(unused):
            continue
        if isinstance(root, TextTower) and name.endswith(".attn.out_proj"):
            found |= {name.replace("out_proj", one): layer.weight.shape for one in PACKED}
        found[name] = layer.weight.shape
    return found


def unused(model: nn.Module) -> tuple[str, ...]:
    """The prefixes of layers that a model does not compute: changes of them change nothing."""
    return tuple(_unused(model, prefix) for prefix, _ in parts(model).values())


def _unused(model: nn.Module, prefix: str) -> str:
    """The prefix of the layers that the text encoder of a prefix does not compute; `?` for none."""
    encoder = _text_encoders(model).get(prefix.removesuffix(".model."))
    skips = isinstance(encoder, OpenCLIPText) and encoder.layer == "penultimate"
    if not skips or getattr(encoder, "always_return_pooled", False):
        return "?"
    return f"{prefix}{BLOCKS}{encoder.arch['layers'] - 1}."


def skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The model of a config on the meta device: it has layers but no values, and takes no memory."""
    with torch.device("meta"):
        return untuned_model(config)


# --- dialects


def dialects(model: nn.Module, kinds: tuple[type, ...] = LAYER_TYPES) -> dict[str, dict[str, str]]:
    """LDM layer name -> name in other programs.

    diffusers (`unet.…`, `text_encoder.…`), kohya (`lora_unet_…`, `lora_te_…`; of SDXL `lora_te1_…`, `lora_te2_…` and
    LDM's names of the UNet), ComfyUI (`diffusion_model.…`, `text_encoders.clip_l.…`).
    """
    unet = list(layers_of(model, "unet", kinds=kinds))
    table = unet_table(layout_of(unet))
    theirs = {name: other for name in unet if (other := translate(name.removeprefix(UNET), table))}
    text = {
        part: {name: _in_transformers(name.removeprefix(prefix), root)
               for name in layers_of(model, part, kinds=kinds)}
        for part, (prefix, root) in parts(model).items()
        if part != "unet"
    }  # fmt: skip
    is_xl = len(text) == 2
    stems = {"text_encoder": "te1" if is_xl else "te", "text_encoder_2": "te2"}
    width = {part: "clip_g" if part == "text_encoder_2" else "clip_l" for part in text}
    if not is_xl and text and isinstance(parts(model)["text_encoder"][1], TextTower):
        width["text_encoder"] = "clip_h"  # of Stable Diffusion 2.x
    found = {
        "diffusers": {name: f"unet.{other}" for name, other in theirs.items()},
        "kohya": {n: _joined("lora_unet", n.removeprefix(UNET) if is_xl else other) for n, other in theirs.items()},
        "comfyui": {name: f"diffusion_model.{name.removeprefix(UNET)}" for name in theirs},
    }
    for part, names in text.items():
        found["diffusers"] |= {name: f"{part}.{other}" for name, other in names.items()}
        found["kohya"] |= {name: _joined(f"lora_{stems[part]}", other) for name, other in names.items()}
        found["comfyui"] |= {n: f"text_encoders.{width[part]}.transformer.{other}" for n, other in names.items()}
    return found


def _in_transformers(name: str, root: nn.Module) -> str:
    return layer_name(name) if isinstance(root, TextTower) else f"text_model.{name}"


def _joined(stem: str, name: str) -> str:
    return f"{stem}_{name.replace('.', '_')}"


def names_in(model: nn.Module, names: Iterable[str], dialect: str) -> dict[str, str]:
    """LDM's names of some layers -> those of a dialect, without layers that the model does not compute.

    Raises `InputError` for layers that the model has not.
    """
    table, own = dialects(model)[dialect], packed.split(model.state_dict())
    if lost := [name for name in names if name not in table and f"{name}.weight" not in own]:
        raise InputError(
            f"this config's model has no layer {lost[0]} ({len(lost)} such): name the config of the base that the LoRA "
            "was made for with --config"
        )
    return {name: table[name] for name in names if name in table}


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
    if part in TEXT_PARTS:
        theirs = dialects(model)["diffusers"]
        keys = {n: (int(theirs[n].split(".layers.")[1].split(".")[0]), theirs[n].split(".")[-1]) for n in found}
        return dict(sorted(found.items(), key=lambda item: (keys[item[0]][0], TEXT_LAYERS.index(keys[item[0]][1]))))
    if (key := ORDERS[order]) is None:
        return found
    names = dialects(model)["diffusers"]
    return dict(sorted(found.items(), key=lambda item: key(names[item[0]])))
