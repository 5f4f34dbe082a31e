"""Text encoders as diffusers' folders hold them: transformers' JSON and names, for CLIP and for OpenCLIP's towers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import find_file, plain
from ldm.errors import InputError
from ldm.files import read_json
from ldm.modules.encoders.modules import CLIP_VIT_L_14
from ldm.modules.encoders.open_clip import text_config as tower_config
from ldm.modules.encoders.vocabulary import END, SIZE, shipped_folder

CLIP_L = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")

# OpenCLIP's modules by transformers' names: in a block, and outside of blocks
IN_BLOCK = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
}
BLOCKS, THEIR_BLOCKS = "transformer.resblocks.", "text_model.encoder.layers."
PACKED = ("q_proj", "k_proj", "v_proj")  # rows of OpenCLIP's `in_proj_weight` and `in_proj_bias`, in this order
LOGIT_SCALE = math.log(100)  # of released files; it belongs to CLIP's training


# --- embedders of a config


@dataclass(frozen=True)
class Embedder:
    """A text encoder in a config. `number`: its place among the embedders of SDXL."""

    target: str
    params: Mapping[str, Any]

    @property
    def is_open_clip(self) -> bool:
        return "OpenCLIP" in self.target

    def json(self) -> dict[str, Any]:
        """transformers' configuration. `num_hidden_layers` is the number of layers that a folder holds."""
        if not self.is_open_clip:
            return clip_json(self.params.get("version", CLIP_L))
        arch = tower_config(self.params.get("arch", "ViT-H-14"))
        return {
            "vocab_size": arch["vocab_size"],
            "hidden_size": arch["width"],
            "intermediate_size": int(arch["width"] * arch["mlp_ratio"]),
            "num_hidden_layers": arch["layers"] - self.skipped,
            "num_attention_heads": arch["heads"],
            "max_position_embeddings": arch["context_length"],
            "hidden_act": "quick_gelu" if arch["quick_gelu"] else "gelu",
            "projection_dim": arch["embed_dim"],
            "bos_token_id": SIZE - 2,
            "eos_token_id": SIZE - 1,
            "pad_token_id": 1,
        }

    @property
    def skipped(self) -> int:
        """How many last layers are not computed. diffusers leaves them out of a folder, as for Stable Diffusion 2.x."""
        skips = self.params.get("layer", "last") == "penultimate" and not self.params.get("always_return_pooled")
        return int(self.is_open_clip and skips)

    def tokenizer(self) -> AbstractContextManager[Path | None]:
        """A context with a folder that has vocab.json and merges.txt; None if this machine has none."""
        version = CLIP_L if self.is_open_clip else self.params.get("version", CLIP_L)
        folders = [self.params.get("tokenizer")]
        folders += [] if self.is_open_clip else [version, f"models/{Path(version).name}"]
        found = next((f for f in (find_file(f) for f in folders if f) if (f / "vocab.json").is_file()), None)
        if found is None and self.json()["vocab_size"] == SIZE:
            return shipped_folder()
        return nullcontext(found)


def embedders(params: Mapping[str, Any]) -> dict[str, Embedder]:
    """The text encoders of `model.params`, by the names of the parts of a `Base`."""
    params = plain(params)
    entries = ((params.get("conditioner_config") or {}).get("params") or {}).get("emb_models")
    if entries is None:
        entries = [params["cond_stage_config"]] if isinstance(params.get("cond_stage_config"), Mapping) else []
    found = [entry for entry in entries if "CLIP" in str(entry.get("target"))]
    names = ("text_encoder", "text_encoder_2")
    return {
        name: Embedder(str(entry["target"]), entry.get("params") or {})
        for name, entry in zip(names, found, strict=False)
    }


def clip_json(version: str) -> dict[str, Any]:
    """The configuration of a CLIP in a folder, else of Stable Diffusion v1's."""
    file = find_file(version) / "config.json"
    config = read_json(file) if file.is_file() else CLIP_VIT_L_14
    return {key: value for key, value in config.get("text_config", config).items() if key != "architectures"}


def refuse_other_states(found: Mapping[str, Embedder]) -> None:
    """Raises `InputError` for two encoders whose hidden states are not those that diffusers' SDXL takes."""
    if len(found) != 2:
        return
    first, second = found.values()
    last_but_one = {"layer": "hidden", "layer_idx": first.json()["num_hidden_layers"] - 1}
    released = {"layer": "penultimate", "legacy": False, "always_return_pooled": True}
    for embedder, wanted in ((first, last_but_one), (second, released)):
        own = {name: embedder.params.get(name) for name in wanted}
        if own != wanted:
            raise InputError(
                f"diffusers' SDXL takes the states before the last layer of its text encoders: "
                f"{embedder.target.split('.')[-1]} must have {wanted}, this config has {own}"
            )


def save_tokenizer(place: Path, source: Path, embedder: Embedder) -> None:
    """Copy a tokenizer's files into a new folder. OpenCLIP pads with the entry of id 0."""
    place.mkdir(parents=True)
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            (place / file).write_bytes((source / file).read_bytes())
    if not embedder.is_open_clip:
        return
    [pad] = [word for word, number in read_json(source / "vocab.json").items() if number == 0]
    markers = {"bos_token": "<|startoftext|>", "eos_token": END, "pad_token": pad, "unk_token": END}
    length = min(embedder.params.get("max_length", 77), embedder.json()["max_position_embeddings"])
    own = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **markers}
    (place / "special_tokens_map.json").write_text(json.dumps(markers, indent=2))
    (place / "tokenizer_config.json").write_text(json.dumps(own, indent=2))


# --- weights


def from_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIP's weights with the names of released checkpoints, from any version of transformers."""
    return {
        "text_model." + name.removeprefix("text_model."): value
        for name, value in weights.items()
        if not name.endswith("position_ids")
    }


def to_transformers(weights: Mapping[str, Tensor], layers: int, projected: bool) -> dict[str, Tensor]:
    """The weights of OpenCLIP's tower with transformers' names: the first `layers` blocks, and the projection if asked.

    Raises `InputError` for names that the tower does not have.
    """
    named: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.startswith(BLOCKS):
            number, _, inner = name.removeprefix(BLOCKS).partition(".")
            if int(number) < layers:
                named |= _in_block(f"{THEIR_BLOCKS}{number}", inner, value)
        elif name in (outside := {ours: theirs for theirs, ours in OUTSIDE.items()}):
            named[outside[name]] = value
        elif name == "text_projection":
            named |= {"text_projection.weight": value.T.contiguous()} if projected else {}
        elif name not in ("logit_scale", "attn_mask"):
            raise InputError(f"{name} is no weight of OpenCLIP's text encoder")
    return named


def _in_block(outer: str, inner: str, value: Tensor) -> dict[str, Tensor]:
    """A weight of a block, of which q, k and v are rows of one matrix, with transformers' names."""
    module, _, kind = inner.rpartition(".")
    if module == "attn":
        rows = zip(PACKED, value.chunk(3), strict=True)
        return {f"{outer}.self_attn.{part}.{kind.removeprefix('in_proj_')}": row.clone() for part, row in rows}
    theirs = {ours: theirs for theirs, ours in IN_BLOCK.items()}
    if module not in theirs:
        raise InputError(f"{inner} is no weight of a block of OpenCLIP's text encoder")
    return {f"{outer}.{theirs[module]}.{kind}": value}


def layer_name(name: str) -> str:
    """A layer of OpenCLIP's tower, of which q, k and v are layers of their own, with transformers' name."""
    if not name.startswith(BLOCKS):
        return f"text_model.{name.replace('ln_final', 'final_layer_norm')}"
    number, _, inner = name.removeprefix(BLOCKS).partition(".")
    theirs = {ours: theirs for theirs, ours in IN_BLOCK.items()}
    return f"{THEIR_BLOCKS}{number}.{theirs.get(inner, inner.replace('attn.', 'self_attn.'))}"


def from_transformers(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights of OpenCLIP's tower from transformers' names.

    Without a projection, the folder lacks the tower's last layer as well, which Stable Diffusion 2.x does not compute.
    It becomes a layer that changes nothing, so that both settings of `layer` give the same. Raises `InputError`.
    """
    named: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    projection = weights.get("text_projection.weight")
    for name, value in from_clip({n: v for n, v in weights.items() if n != "text_projection.weight"}).items():
        number, _, inner = name.removeprefix(THEIR_BLOCKS).partition(".")
        module, _, kind = inner.rpartition(".")
        if name in OUTSIDE:
            named[OUTSIDE[name]] = value
        elif module in IN_BLOCK:
            named[f"{BLOCKS}{number}.{IN_BLOCK[module]}.{kind}"] = value
        elif (part := module.removeprefix("self_attn.")) in PACKED:
            packed.setdefault(f"{BLOCKS}{number}.attn.in_proj_{kind}", {})[part] = value
        else:
            raise InputError(f"{source}: {name} is no weight of a CLIP text encoder")
    for name, parts in packed.items():
        if lacking := [part for part in PACKED if part not in parts]:
            raise InputError(f"{source}: {name} lacks {', '.join(lacking)}; is the download complete?")
        named[name] = torch.cat([parts[part] for part in PACKED])
    end = _unused_end(named, source) if projection is None else {"text_projection": projection.T.contiguous()}
    return named | end | {"logit_scale": torch.tensor(LOGIT_SCALE)}


def _unused_end(named: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A last layer of zeros, which leaves the states as they are, and the identity as projection."""
    table = named.get("ln_final.weight")
    if table is None:
        raise InputError(f"{source}: the text encoder has no final_layer_norm; is the download complete?")
    numbers = [int(name.removeprefix(BLOCKS).split(".")[0]) for name in named if name.startswith(BLOCKS)]
    first, last = (f"{BLOCKS}{number}." for number in (0, 1 + max(numbers, default=-1)))
    layer = {
        last + name.removeprefix(first): torch.ones_like(value) if ".ln_" in name and "weight" in name
        else torch.zeros_like(value)
        for name, value in named.items()
        if name.startswith(first)
    }  # fmt: skip
    return layer | {"text_projection": torch.eye(len(table), dtype=table.dtype)}
