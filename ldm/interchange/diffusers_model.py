"""Stable Diffusion v1 models from and to diffusers' folders (unet/, vae/, text_encoder/, tokenizer/, scheduler/)."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import atomic_write, read_weights, save_json, save_safetensors
from ldm.config import find_file, plain
from ldm.errors import InputError, short
from ldm.files import read_json
from ldm.interchange import layers
from ldm.interchange.diffusers_json import BETAS, PREDICTIONS, check, heads, of_folder, text_config
from ldm.interchange.formats import Codec, Context, Opened
from ldm.interchange.names import (
    TEXT,
    UNET,
    VAE,
    inverse,
    layout_of,
    layout_of_diffusers,
    translate_all,
    unet_table,
    vae_table,
)
from ldm.models.bases import BASES, DEFAULT, Base, Part, base_of, explained

log = logging.getLogger(__name__)

TOKENIZER_FILES = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in older versions


# --- weights: LDM's names <-> {"unet": ..., "vae": ..., "text_encoder": ...}


def to_diffusers(weights: Mapping[str, Tensor], source: str = "the checkpoint") -> dict[str, dict[str, Tensor]]:
    """The weights of a `LatentDiffusion` by part and diffusers' name. Raises `InputError` for other models."""
    unet, vae, text = (_below(weights, prefix) for prefix in (UNET, VAE, TEXT))
    if not (unet and vae and text):
        error = InputError(
            f"{source} is not a whole Stable Diffusion v1 model: expected UNet, autoencoder, text encoder"
        )
        raise explained(error, weights, source)
    tables = {"unet": unet_table(layout_of(unet)), "vae": vae_table(*_vae_layout(vae))}
    parts = {part: _renamed(content, tables[part], source) for part, content in (("unet", unet), ("vae", vae))}
    parts["vae"] = {name: value.reshape(_flat_if_attention(name, value)) for name, value in parts["vae"].items()}
    return parts | {"text_encoder": {name: value for name, value in text.items() if not name.endswith("position_ids")}}


def from_diffusers(parts: Mapping[str, Mapping[str, Tensor]], source: str = "the folder") -> dict[str, Tensor]:
    """The weights of a `LatentDiffusion` from those of diffusers' parts. Raises `InputError`."""
    vae = {_modern(name): value for name, value in parts["vae"].items()}
    levels = 1 + max((int(name.split(".")[2]) for name in vae if name.startswith("encoder.down_blocks.")), default=0)
    count = 1 + max((int(n.split(".")[4]) for n in vae if n.startswith("encoder.down_blocks.0.resnets.")), default=0)
    vae = _renamed(vae, inverse(vae_table(levels, count)), source)
    vae = {name: value[..., None, None] if _is_attention(name, value) else value for name, value in vae.items()}
    unet = _renamed(parts["unet"], inverse(unet_table(layout_of_diffusers(parts["unet"]))), source)
    text = {"text_model." + name.removeprefix("text_model."): value for name, value in parts["text_encoder"].items()}
    return {
        prefix + name: value
        for prefix, part in ((UNET, unet), (VAE, vae), (TEXT, text))
        for name, value in part.items()
        if not name.endswith("position_ids")
    }


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _renamed(weights: Mapping[str, Tensor], table: Mapping[str, str], source: str) -> dict[str, Tensor]:
    names = translate_all(weights, table, source)
    return {names[name]: value for name, value in weights.items()}


def _vae_layout(vae: Mapping[str, Tensor]) -> tuple[int, int]:
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


# --- configurations


def configurations(params: Mapping[str, Any], base: Base = DEFAULT) -> dict[str, dict[str, Any]]:
    """The JSON of each part for `model.params` of an LDM config, and the `model_index.json` under "" ."""
    unet, vae = (plain(params[key]["params"]) for key in ("unet_config", "first_stage_config"))
    dd = vae["ddconfig"]
    if dd.get("attn_resolutions") or "embed_dim" not in vae:
        raise InputError(
            "only KL autoencoders without attention at their levels have a counterpart in diffusers' SD v1"
        )
    mult, rates = unet.get("channel_mult", [1, 2, 4, 8]), unet["attention_resolutions"]
    attends = [2**level in rates for level in range(len(mult))]
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
    own_heads = heads(unet)
    parts = base.parts
    classes = {part.folder: [part.library, part.cls] for part in parts.values()}
    classes |= {name: list(others) for name, others in base.others.items()}
    return {
        "": {
            "_class_name": base.pipeline,
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            **dict(sorted(classes.items())),
        },
        parts["unet"].folder: {
            "_class_name": parts["unet"].cls,
            "act_fn": "silu",
            # this is diffusers' historical name for the number of heads
            "attention_head_dim": own_heads[0] if len(set(own_heads)) == 1 else own_heads,
            "use_linear_projection": unet.get("use_linear_in_transformer", False),
            "block_out_channels": [unet["model_channels"] * m for m in mult],
            "cross_attention_dim": unet["context_dim"],
            "down_block_types": down,
            "up_block_types": up,
            "in_channels": unet["in_channels"],
            "out_channels": unet["out_channels"],
            "layers_per_block": unet["num_res_blocks"],
            "norm_eps": 1e-5,
            "norm_num_groups": unet.get("norm_num_groups", 32),
            "sample_size": params.get("image_size", 64),
            "transformer_layers_per_block": unet.get("transformer_depth", 1),
        },
        parts["vae"].folder: {
            "_class_name": parts["vae"].cls,
            "act_fn": "silu",
            "block_out_channels": [dd["ch"] * m for m in dd["ch_mult"]],
            "down_block_types": ["DownEncoderBlock2D"] * len(dd["ch_mult"]),
            "up_block_types": ["UpDecoderBlock2D"] * len(dd["ch_mult"]),
            "in_channels": dd["in_channels"],
            "out_channels": dd["out_ch"],
            "latent_channels": vae["embed_dim"],
            "layers_per_block": dd["num_res_blocks"],
            "norm_num_groups": dd.get("norm_num_groups", 32),
            "sample_size": dd["resolution"],
            "scaling_factor": params.get("scale_factor", 1.0),
        },
        parts["text_encoder"].folder: {
            "architectures": [parts["text_encoder"].cls],
            "model_type": "clip_text_model",
            # transformers would else load the dtype of the file while diffusers loads float32, which do not mix
            "torch_dtype": "float32",
            **_text(params, base),
        },
        "scheduler": _scheduler(params, base),
    }


def _scheduler(params: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """The schedule. Raises `InputError` for one that diffusers lacks."""
    schedule, zero = params.get("beta_schedule", "linear"), bool(params.get("zero_terminal_snr", False))
    if schedule not in BETAS:
        raise InputError(f"diffusers has no counterpart of the beta_schedule {schedule!r}; expected {', '.join(BETAS)}")
    own = {"skip_prk_steps": True} if not zero else {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {
        "_class_name": "DDIMScheduler" if zero else base.others["scheduler"][1],
        "beta_start": params.get("linear_start", 1e-4),
        "beta_end": params.get("linear_end", 2e-2),
        "beta_schedule": BETAS[schedule],
        "clip_sample": False,
        "num_train_timesteps": params.get("timesteps", 1000),
        "prediction_type": PREDICTIONS[params.get("parameterization", "eps")],
        "set_alpha_to_one": False,
        "steps_offset": 1,
        **own,
    }


def _text(params: Mapping[str, Any], base: Base) -> dict[str, Any]:
    config = text_config(params, base.text_model)
    return {key: value for key, value in config.items() if key not in ("architectures",)}


# --- folders


def write_folder(
    path: str | Path, weights: Mapping[str, Tensor], params: Mapping[str, Any], source: str = "the checkpoint"
) -> None:
    """Write a diffusers folder for the weights of a `LatentDiffusion` and `model.params` of its config. Atomic.

    Raises `InputError` for a model that is not of the Stable Diffusion v1 family, and for a config of another model.
    """
    base = _base_of(weights)
    parts, configs = to_diffusers(weights, source), configurations(params, base)
    _compare(weights, params, source)
    tokenizer = tokenizer_folder(params, base)
    if tokenizer is None:
        configs[""]["tokenizer"] = [None, None]
        log.warning("%s will have no tokenizer: name its folder in cond_stage_config.params.tokenizer", path)
    with atomic_write(path) as beside:
        save_json(beside / "model_index.json", configs.pop(""))
        for part, config in configs.items():
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            save_json(beside / part / name, config)
        for part, tensors in parts.items():
            place = base.parts[part]
            save_safetensors(beside / place.folder / f"{place.file}.safetensors", tensors, {"format": "pt"})
        if tokenizer:
            (beside / "tokenizer").mkdir()
            for file in TOKENIZER_FILES:
                if (tokenizer / file).is_file():
                    shutil.copyfile(tokenizer / file, beside / "tokenizer" / file)


def _compare(weights: Mapping[str, Tensor], params: Mapping[str, Any], source: str) -> None:
    """Raises `InputError` if the weights do not fit the config, from which the folder's JSON files are made."""
    model = layers.skeleton({"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}})
    wanted, found = (
        {n: list(v.shape) for n, v in state.items() if n.startswith((UNET, VAE, TEXT))}
        for state in (model.state_dict(), weights)
    )
    names = [name for name in wanted | found if not name.endswith("position_ids")]  # some versions omit them
    if wrong := [name for name in names if wanted.get(name) != found.get(name)]:
        theirs, ours = (side.get(wrong[0], "none") for side in (found, wanted))
        error = InputError(
            f"{source} does not fit this config: {wrong[0]} has shape {theirs}, the config's model {ours} "
            f"({len(wrong)} such); use the config that the checkpoint was made with"
        )
        raise explained(error, weights, source, model.state_dict())


def tokenizer_folder(params: Mapping[str, Any], base: Base = DEFAULT) -> Path | None:
    """The folder with vocab.json and merges.txt that a config's text encoder uses, if it is on this machine."""
    text = params["cond_stage_config"].get("params") or {}
    version = text.get("version", base.text_model)
    folders = [text.get("tokenizer"), version, f"models/{Path(version).name}"]
    return next((f for f in (find_file(f) for f in folders if f) if (f / "vocab.json").is_file()), None)


def read_folder(path: str | Path) -> dict[str, Tensor]:
    """The weights of a diffusers folder under LDM's names. Raises `InputError`."""
    path = Path(path)
    if not is_folder(path):
        raise InputError(f"{path} is not a diffusers model: expected a folder with model_index.json")
    pipeline = _pipeline(path / "model_index.json")
    base = next((base for base in BASES if base.pipeline and base.pipeline == pipeline), None)
    parts = (base or DEFAULT).parts
    try:
        weights = from_diffusers({n: _read_part(path / part.folder, part) for n, part in parts.items()}, str(path))
    except InputError as error:
        if base or not pipeline:
            raise
        known = ", ".join(dict.fromkeys(base.pipeline for base in BASES if base.pipeline))
        raise InputError(f"{path} is a folder of {short(pipeline)}; expected one of {known} ({error})") from None
    found = base_of(weights)
    if found and found.parts["text_encoder"].prefix != TEXT:
        raise InputError(
            f"{path} is a diffusers folder of {found.title}, whose text encoder is built otherwise here: "
            "use the model's checkpoint, a single file"
        )
    return weights


def _pipeline(index: Path) -> str | None:
    """The pipeline's name, which only selects a row of our table; None if it cannot be read."""
    try:
        found = read_json(index)
    except InputError:
        return None
    name = found.get("_class_name") if isinstance(found, Mapping) else None
    return name if isinstance(name, str) else None


def _base_of(weights: Mapping[str, Tensor]) -> Base:
    """The base that defines the folder layout for these weights: their own base, else Stable Diffusion v1."""
    base = base_of(weights)
    return base if base and base.pipeline else DEFAULT


def is_folder(path: str | Path) -> bool:
    """Whether a path is a diffusers model folder."""
    return (Path(path) / "model_index.json").is_file()


def _read_part(folder: Path, part: Part) -> dict[str, Tensor]:
    stems = [part.file, part.older]
    files = [folder / f"{s}{v}.{e}" for v in ("", ".fp16") for s, e in zip(stems, ("safetensors", "bin"), strict=True)]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise InputError(f"{folder} holds none of {', '.join(f.name for f in files)}; is the download complete?")
    return read_weights(found)


# --- the row


def _read(file: Opened, context: Context) -> Mapping[str, Tensor]:
    if context.config is not None:
        check(file.path, context.params, file.given)
    return context.checked(read_folder(file.path), file.given)


def _write(path: Path, weights: Mapping[str, Tensor], context: Context) -> None:
    write_folder(path, weights, context.params, context.source)


FOLDER = Codec(
    lambda file: file.path.is_dir() and is_folder(file.path),
    {"model": _read},
    _write,
    notes=lambda file: of_folder(file.path),
)
