"""LoRA files with layer names: diffusers and PEFT (`unet.….lora_A.weight`), kohya (`….lora_down.weight`).

One table reads all spellings: the end of a key is its role, the part before it is the layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import refuse_not_finite, save_safetensors, weights_in
from ldm.errors import InputError, short
from ldm.interchange import bundled, packed, peft_config
from ldm.interchange.formats import Codec, Context, Opened, open_file
from ldm.interchange.layers import LAYER_TYPES, dialects, names_in
from ldm.interchange.lora import Factors, Lora, fitted, folded, rank_of, weighted_sum
from ldm.interchange.names import UNET
from ldm.modules.encoders.tokens import Vectors
from ldm.patterns import Patterns

# Starts of keys in kohya's spelling; LyCORIS's wrapper has one of its own, also for plain LoRA.
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_")
COMFYUI = ("diffusion_model.", "text_encoders.")
# The file within a folder of diffusers' scripts, which may lie there alone.
WEIGHTS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
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


def keys_of(content: Any) -> list[str]:
    """The names of a file's tensors, with or without a `state_dict` level."""
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    return list(map(str, content)) if isinstance(content, Mapping) else []


def is_keyed(content: Any) -> bool:
    """Whether the names of a file's tensors are those of a LoRA that names its layers."""
    return any((found := split(key)) and found[1] != "alpha" for key in keys_of(content))


def is_kohya(content: Any) -> bool:
    """Whether they are in kohya's spelling."""
    return is_keyed(content) and any(key.startswith(KOHYA) for key in keys_of(content))


def is_comfyui(content: Any) -> bool:
    """Whether they are in ComfyUI's own spelling, LDM's names of the UNet."""
    return is_keyed(content) and any(key.startswith(COMFYUI) for key in keys_of(content))


def file_of(path: str | Path) -> Path:
    """The file with the weights: in a folder of PEFT or diffusers, the file inside; else the path itself."""
    files = [Path(path) / name for name in (*peft_config.WEIGHTS, *WEIGHTS)]
    return next((file for file in files if file.is_file()), Path(path))


def read_factors(path: str | Path | Opened, initial: bool = False) -> dict[str, Factors]:
    """The factors of a file by its own layer names, with the scale that they were trained with.

    They change the released base; with `initial` they are those in the file, whatever base they belong to.

    The scale is alpha / rank with the file's own alpha, else the one of PEFT's configuration, else 1, as in diffusers.
    Raises `InputError` for keys that do not belong to a LoRA and for a damaged configuration.
    """
    file = open_file(path)
    path = file.path
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    weights = weights_in(file.content, path)
    refuse_not_finite(weights, str(path))
    weights, _ = bundled.taken_out(weights, str(path))
    for key, value in weights.items():
        if (parts := split(key)) is None:
            unknown.append(key)
        else:
            found.setdefault(parts[0], {})[parts[1]] = value
    unknown += [layer for layer, roles in found.items() if not {"up", "down"} <= roles.keys()]
    if unknown:
        raise beside_lora(file, unknown)
    factors = {}
    try:
        configs, patterns = peft_config.configurations(file), Patterns(f"{path}: PEFT's configuration is damaged")
        for layer, roles in found.items():
            factors[layer] = _checked(layer, roles, path)
            if "alpha" not in roles:
                scale = peft_config.scale(plain_name(layer), factors[layer].rank, configs, patterns)
                factors[layer] = factors[layer]._replace(scale=scale)
        return factors if initial else _since_start(factors, file, configs)
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: PEFT's configuration is damaged ({error!r})") from None


def _checked(layer: str, roles: Mapping[str, Tensor], path: Path) -> Factors:
    """The factors of a layer, with its alpha if the file has one. Raises `InputError` if they cannot be multiplied."""
    down, up = roles["down"], roles["up"]
    rank = rank_of(down, layer, str(path))
    if min(down.dim(), up.dim()) < 2 or up.flatten(1).shape[1] != rank:
        raise InputError(
            f"{path}: {short(layer)} has factors of {list(down.shape)} and {list(up.shape)}; "
            "expected [rank, inputs] and [outputs, rank]"
        )
    if (alpha := roles.get("alpha")) is None:
        return Factors(down, up)
    number = alpha.item() if alpha.numel() == 1 else alpha.shape
    return Factors(down, up, peft_config.finite_alpha(number, layer, path) / rank)


def beside_lora(file: Opened, keys: list[str]) -> InputError:
    """The error for what PEFT may train beside the factors, and for other unknown keys."""
    advice = "no LoRA here has that: merge it into its base with PEFT"
    if biases := [key for key in keys if key.endswith((".lora_B.bias", ".lora_up.bias"))]:
        return InputError(f"{file.path} was trained with lora_bias ({biases[0]}), and {advice}")
    if saved := [key for key in keys if peft_config.saves(file, key)]:
        return InputError(f"{file.path} holds whole weights of PEFT's modules_to_save ({saved[0]}), and {advice}")
    return unknown_keys(file.path, keys)


def unknown_keys(path: str | Path, keys: list[str]) -> InputError:
    """The error for keys that no known file has."""
    return InputError(f"{path}: {len(keys)} unknown keys, e.g. {', '.join(keys[:3])}; wrong base model or format?")


def _since_start(factors: dict[str, Factors], file: Opened, configs: Mapping[str, Any]) -> dict[str, Factors]:
    """The change of the released base, where training began with another one, see `peft_config.start_of`."""
    for part, config in configs.items():
        own = {layer: one for layer, one in factors.items() if plain_name(layer).startswith(part)}
        start = peft_config.start_of(config, file) if own else None
        if start is None:
            continue
        initial = {plain_name(layer): one for layer, one in read_factors(start, initial=True).items()}
        if {plain_name(layer) for layer in own} - initial.keys():
            raise InputError(f"{file.given}: {start} holds the start of another LoRA: its layers differ")
        pairs = {layer: [Lora({layer: one}), Lora({layer: initial[plain_name(layer)]})] for layer, one in own.items()}
        factors = factors | {layer: weighted_sum(pair, [1, -1]).layers[layer] for layer, pair in pairs.items()}
    return factors


def read(path: str | Path | Opened, model: nn.Module) -> Lora:
    """Read a LoRA of any of these spellings. Raises `InputError` for unknown keys and another base model."""
    file = open_file(path)
    lora = named(read_factors(file), model, str(file.given))
    return Lora(lora.layers, words(file))


def named(found: Mapping[str, Factors], model: nn.Module, source: str) -> Lora:
    """Factors by the names of a model's layers. Raises `InputError` for unknown names and another base model."""
    known = lookup(model)
    if unknown := [layer for layer in found if plain_name(layer) not in known]:
        raise unknown_keys(source, unknown)
    shapes = packed.split(model.state_dict())
    placed: dict[str, Factors] = {}
    for layer, factors in found.items():
        name = known[plain_name(layer)]
        if name in placed:
            raise InputError(f"{source} changes {name} twice, under two spellings, e.g. {short(layer)}")
        placed[name] = fitted(factors, shapes[f"{name}.weight"].shape, name, source)
    return Lora(placed)


def words(file: Opened) -> dict[str, Vectors]:
    """The words in a LoRA file, see `bundled`."""
    return bundled.taken_out(weights_in(file.content, file.path), str(file.given))[1]


def plain_name(layer: str) -> str:
    """A layer's current name in diffusers: without PEFT's wrapping and attention processors, with a missing `.0`."""
    layer = layer.removeprefix("base_model.model.").replace(".processor.", ".")
    if ".self_attn.to_" in layer:  # a text encoder of early versions
        return re.sub(r"\.to_([qkv]|out)$", r".\1_proj", layer)
    return re.sub(r"\.to_out$", ".to_out.0", layer)


def lookup(model: nn.Module, kinds: tuple[type, ...] = LAYER_TYPES) -> dict[str, str]:
    """Every name that LoRA files use for a layer -> LDM's name."""
    names, table = dialects(model, kinds), {}
    for ours, theirs in names["diffusers"].items():
        part, _, inner = theirs.partition(".")
        spelt = _of_unet(ours.removeprefix(UNET), inner) if part == "unet" else _of_text(part, inner)
        table |= dict.fromkeys(spelt, ours)
    for dialect in names.values():
        table |= {theirs: ours for ours, theirs in dialect.items()}
    return table


def _of_unet(ours: str, theirs: str) -> list[str]:
    """The spellings of a layer of the UNet by LDM's and diffusers' names within it; `diffusion_model.` is ComfyUI's."""
    dotted = [f"{start}{name}" for name in (ours, theirs) for start in ("unet.", "", "diffusion_model.")]
    flat = [name.replace(".", "_") for name in (ours, theirs)]
    return dotted + [f"{start}{name}" for name in flat for start in ("lora_unet_", "lycoris_unet_", "lycoris_")]


# The beginnings of a text encoder's layers with dots and with underscores; only the first one may go without.
TEXT_STARTS = {
    "text_encoder": (
        ("text_encoder.", "", "text_encoders.clip_l.transformer.", "text_encoders.clip_l.", "clip_l.transformer."),
        ("lora_te_", "lora_te1_", "lycoris_te_", "lycoris_te1_", "lycoris_"),
    ),
    "text_encoder_2": (
        ("text_encoder_2.", "text_encoders.clip_g.transformer.", "text_encoders.clip_g.", "clip_g.transformer."),
        ("lora_te2_", "lycoris_te2_"),
    ),
}


def _of_text(part: str, name: str) -> list[str]:
    """The spellings of a layer of a text encoder; transformers 5 has no level `text_model`."""
    dotted, flat = TEXT_STARTS[part]
    names = [name, name.replace("text_model.", "", 1)]
    return [f"{start}{one}" for one in names for start in dotted] + [
        f"{start}{one.replace('.', '_')}" for one in names for start in flat
    ]


def write_diffusers(path: str | Path, lora: Lora, model: nn.Module) -> None:
    """Write a file for diffusers' `load_lora_weights`. `up` includes the scale, because the format has no alpha."""
    tensors = {}
    for layer, name in names_in(model, lora.layers, "diffusers").items():
        down, up, _ = folded(lora.layers[layer])
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_safetensors(path, tensors, {"format": "pt"})


def write_kohya(
    path: str | Path, lora: Lora, model: nn.Module, dialect: str = "kohya", bundles: bool = False
) -> None:
    """Write a file for web UIs: the factors unchanged, and alpha = scale * rank. ComfyUI's has other names.

    With `bundles`, learnt words are in it, too.

    If the layers have several alphas, all get the largest rank as alpha, and `up` has the rest of the scale, because
    diffusers reads mixed alphas wrongly.
    """
    tensors, several = {}, len({one.scale * one.rank for one in lora.layers.values()}) > 1
    alpha = max((one.rank for one in lora.layers.values()), default=1)
    for layer, stem in names_in(model, lora.layers, dialect).items():
        factors = lora.layers[layer]
        if several:
            scale = alpha / factors.rank
            factors = Factors(factors.down, factors.up * (factors.scale / scale), scale)
        tensors |= {
            f"{stem}.lora_down.weight": factors.down,
            f"{stem}.lora_up.weight": factors.up,
            f"{stem}.alpha": torch.tensor(float(factors.scale * factors.rank)),
        }
    tensors |= bundled.written(lora.tokens) if bundles else {}
    known = {"ss_network_module": "networks.lora"} if dialect == "kohya" else {}
    save_safetensors(path, tensors, {**known, "format": "pt"})


# --- the rows


def _lora(file: Opened, context: Context) -> Lora:
    return Lora(read_factors(file), words(file)) if context.model is None else read(file, context.model)


READS = {"lora": _lora, "words": lambda file, _: words(file)}
COMFYUI_FILE = Codec(
    lambda file: is_comfyui(file.content),
    READS,
    lambda path, lora, context: write_kohya(path, lora, context.model, "comfyui", context.bundles),
)
DIFFUSERS = Codec(
    lambda file: is_keyed(file.content) and not is_kohya(file.content),
    READS,
    lambda path, lora, context: write_diffusers(path, lora, context.model),
    file_in=file_of,
)
KOHYA_FILE = Codec(
    lambda file: is_kohya(file.content),
    READS,
    lambda path, lora, context: write_kohya(path, lora, context.model, bundles=context.bundles),
)
