"""The weights of whole models by LDM's names, and by those of diffusers' parts: unet, vae, text encoders."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ldm.errors import InputError
from ldm.interchange import text_encoders
from ldm.interchange.names import inverse, layout_of, layout_of_diffusers, translate_all, unet_table, vae_table
from ldm.models.bases import DEFAULT, Base, Part, explained

OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in older versions
ALL_LAYERS = 10**6

Weights = Mapping[str, Tensor]


def to_diffusers(
    weights: Weights, source: str = "the checkpoint", base: Base = DEFAULT, layers: Mapping[str, int] | None = None
) -> dict[str, dict[str, Tensor]]:
    """The weights of a model by part and diffusers' name. `layers`: how many layers of a text encoder to take.

    Raises `InputError` for other models.
    """
    parts = {name: _below(weights, part.prefix) for name, part in base.parts.items()}
    refuse_parts(weights, base, source)
    found = {"unet": _renamed(parts["unet"], unet_table(layout_of(parts["unet"])), source)}
    vae = _renamed(parts["vae"], vae_table(*_vae_layout(parts["vae"])), source)
    found["vae"] = {name: value.reshape(_flat_if_attention(name, value)) for name, value in vae.items()}
    for name, part in text_parts(base).items():
        found[name] = _text(parts[name], part, (layers or {}).get(name, ALL_LAYERS))
    return found


def from_diffusers(
    parts: Mapping[str, Weights], source: str = "the folder", base: Base = DEFAULT
) -> dict[str, Tensor]:
    """The weights of a model of a base from those of diffusers' parts, some of which may be absent.

    Raises `InputError`.
    """
    found = {"vae": vae_from_diffusers(parts["vae"], source)} if "vae" in parts else {}
    if "unet" in parts:
        found["unet"] = _renamed(parts["unet"], inverse(unet_table(layout_of_diffusers(parts["unet"]))), source)
    for name, part in text_parts(base).items():
        if name not in parts:
            continue
        is_clip = part.spelling == "clip"
        found[name] = (
            text_encoders.from_clip(parts[name]) if is_clip else text_encoders.from_transformers(parts[name], source)
        )
    return {base.parts[part].prefix + name: value for part, content in found.items() for name, value in content.items()}


def vae_from_diffusers(weights: Weights, source: str) -> dict[str, Tensor]:
    """The weights of an autoencoder by LDM's names from those of diffusers, old or new. Raises `InputError`."""
    vae = {_modern(name): value for name, value in weights.items()}
    levels = 1 + max((int(name.split(".")[2]) for name in vae if name.startswith("encoder.down_blocks.")), default=0)
    count = 1 + max((int(n.split(".")[4]) for n in vae if n.startswith("encoder.down_blocks.0.resnets.")), default=0)
    vae = _renamed(vae, inverse(vae_table(levels, count)), source)
    return {n: value[..., None, None] if _is_attention(n, value) else value for n, value in vae.items()}


def refuse_parts(weights: Weights, base: Base, source: str) -> None:
    """Raises `InputError` for weights that lack a part of a whole model."""
    if lacking := [p.folder for p in base.parts.values() if not any(n.startswith(p.prefix) for n in weights)]:
        options = dict.fromkeys(f"--{name.removesuffix('_2')} FILE_OR_FOLDER" for name in lacking if name != "unet")
        advice = "" if "unet" in lacking else f"; give {' and '.join(options)}"
        error = InputError(f"{source} is not a whole Stable Diffusion model: it lacks {', '.join(lacking)}{advice}")
        raise explained(error, weights, source)


def text_parts(base: Base) -> dict[str, Part]:
    """The text encoders of a base."""
    return {name: part for name, part in base.parts.items() if part.library == "transformers"}


def _text(weights: Weights, part: Part, layers: int) -> dict[str, Tensor]:
    if part.spelling == "clip":
        return {name: value for name, value in weights.items() if not name.endswith("position_ids")}
    return text_encoders.to_transformers(weights, layers, projected="WithProjection" in part.cls)


def _below(weights: Weights, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _renamed(weights: Weights, table: Mapping[str, str], source: str) -> dict[str, Tensor]:
    names = translate_all(weights, table, source)
    return {names[name]: value for name, value in weights.items()}


def _vae_layout(vae: Weights) -> tuple[int, int]:
    levels = {int(name.split(".")[2]) for name in vae if name.startswith("encoder.down.")}
    blocks = {int(name.split(".")[4]) for name in vae if name.startswith("encoder.down.0.block.")}
    return len(levels), len(blocks)


def _modern(name: str) -> str:
    return ".".join(OLD_ATTENTION.get(part, part) for part in name.split("."))


def _flat_if_attention(name: str, value: Tensor) -> tuple[int, ...]:
    """Reshape attention weights: LDM's autoencoder has 1x1 convolutions where diffusers has linear layers."""
    inside = ".attentions." in name and value.dim() == 4
    return tuple(value.shape[:2]) if inside else tuple(value.shape)


def _is_attention(name: str, value: Tensor) -> bool:
    return ".attn_1." in name and value.dim() == 2
