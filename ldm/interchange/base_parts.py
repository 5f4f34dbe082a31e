"""Single parts of a base: an autoencoder or a text encoder, as a folder of diffusers or transformers, or as a file.

A file may be the part alone or hold it among others, by any names in circulation: those of LDM, OpenCLIP, diffusers or
transformers, below any prefix (`first_stage_model.`, `cond_stage_model.transformer.`, `text_encoders.clip_l.`, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ldm.checkpoints import read_weights, refuse_not_finite
from ldm.errors import InputError, short
from ldm.interchange.diffusers_weights import ALL_LAYERS, vae_from_diffusers
from ldm.interchange.hub import folder_of
from ldm.interchange.part_files import read_part
from ldm.interchange.text_encoders import LOGIT_SCALE, from_clip, from_transformers, to_transformers
from ldm.models.bases import SDXL_PARTS, Part

VAE_FIRST = ("encoder.conv_in.weight", "decoder.conv_in.weight")  # in both spellings
VAE_NAMES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.")
CLIP_NAMES = ("embeddings.", "encoder.", "final_layer_norm.")
OPEN_CLIP_NAMES = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection",
                   "logit_scale", "attn_mask")  # fmt: skip
TABLE = "token_embedding.weight"


@dataclass(frozen=True)
class Found:
    """A part that was read. `spelt` gives its weights by the names of a spelling; `json` is the folder of its JSON."""

    kind: str  # `vae` or `text_encoder`
    source: str
    spelt: Callable[[str], Mapping[str, Tensor]]
    json: Path | None = None


def read_vae(path: str | Path) -> Found:
    """The autoencoder in a file or folder. Raises `InputError`."""
    (weights, json), *_ = _contents(path, ("vae",))
    ends = [name.removesuffix(first) for first in VAE_FIRST for name in weights if name.endswith(first)]
    root = next((end for end in ends if ends.count(end) == 2), None)
    if root is None:
        raise InputError(f"{path} holds no autoencoder: {short(list(weights)[:3])}; expected {' and '.join(VAE_FIRST)}")
    own = _below(weights, root, VAE_NAMES)
    refuse_not_finite(own, str(path))
    is_diffusers = any(name.startswith("encoder.down_blocks.") for name in own)
    named = vae_from_diffusers(own, str(path)) if is_diffusers else own
    return Found("vae", str(path), lambda spelling: named, json)


def read_text_encoders(path: str | Path) -> list[Found]:
    """The text encoders in a file or folder, CLIP's or OpenCLIP's, at least one. Raises `InputError`."""
    found = []
    for weights, json in _contents(path, ("text_encoder", "text_encoder_2")):
        for name in weights:
            if name.endswith(TABLE):
                found.append(Found("text_encoder", str(path), _text(weights, name.removesuffix(TABLE), path), json))
    if not found:
        raise InputError(f"{path} holds no text encoder of CLIP: none of its names ends in {TABLE}")
    return found


def _text(weights: Mapping[str, Tensor], outer: str, path: str | Path) -> Callable[[str], Mapping[str, Tensor]]:
    """The function that spells a text encoder, whose table of tokens lies below the prefix `outer`."""
    if outer.endswith("embeddings."):
        inner = outer.removesuffix("embeddings.")
        root = inner.removesuffix("text_model.")
        own, projection = _below(weights, inner, CLIP_NAMES), weights.get(f"{root}text_projection.weight")
        refuse_not_finite(own, str(path))
        projected = {} if projection is None else {"text_projection.weight": projection}
        spelt = {
            "clip": lambda: from_clip(own),
            "open_clip": lambda: from_transformers({**own, **projected}, str(path)),
        }
    else:
        tower = _below(weights, outer, OPEN_CLIP_NAMES)
        refuse_not_finite(tower, str(path))
        spelt = {
            "clip": lambda: to_transformers(tower, ALL_LAYERS, projected=False),
            "open_clip": lambda: {"logit_scale": torch.tensor(LOGIT_SCALE), **tower},
        }
    return lambda spelling: spelt[spelling]()


def _below(weights: Mapping[str, Tensor], root: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights below a prefix whose names begin as those of a part do."""
    starts = tuple(root + name for name in names)
    return {name.removeprefix(root): value for name, value in weights.items() if name.startswith(starts)}


def _contents(path: str | Path, parts: tuple[str, ...]) -> list[tuple[dict[str, Tensor], Path | None]]:
    """The weights in a file, or in those of some parts of a diffusers folder, each with the folder of its JSON."""
    if (folder := folder_of(path)) is None:
        return [(read_weights(path), None)]
    inside = [name for name in parts if (folder / name).is_dir()]
    found = []
    for name, place in [(name, folder / name) for name in inside] or [(parts[0], folder)]:
        part: Part = SDXL_PARTS[name]
        json = place if (place / "config.json").is_file() else None
        found.append((read_part(place, part), json))
    return found
