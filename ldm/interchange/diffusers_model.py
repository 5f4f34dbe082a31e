"""Whole models from and to diffusers' folders (unet/, vae/, text_encoder/, tokenizer/, scheduler/).

Those of Stable Diffusion v1 and 2.x, of their inpainting models, and of SDXL's base.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import atomic_write, save_json, save_safetensors
from ldm.config import plain
from ldm.errors import InputError, short
from ldm.files import read_json
from ldm.interchange import layers
from ldm.interchange.diffusers_json import BETAS, PREDICTIONS, check, heads, of_folder, schedule
from ldm.interchange.diffusers_weights import from_diffusers, refuse_parts, text_parts, to_diffusers
from ldm.interchange.formats import Codec, Context, Opened
from ldm.interchange.part_files import choose, read_part
from ldm.interchange.text_encoders import Embedder, embedders, refuse_other_states, save_tokenizer
from ldm.models.bases import BASES, DEFAULT, FIRST_LAYER, Base, Part, base_of, explained, is_ignored

log = logging.getLogger(__name__)

LAYOUT = "0.21.0"  # the version of diffusers whose layout is written; its pipeline of inpainting asks for one


# --- configurations


def configurations(params: Mapping[str, Any], base: Base = DEFAULT) -> dict[str, dict[str, Any]]:
    """The JSON of each part for `model.params` of a config, and the `model_index.json` under "" .

    Raises `InputError` for a model that has no counterpart in diffusers.
    """
    params = plain(params)
    classes = {part.folder: [part.library, part.cls] for part in base.parts.values()}
    classes |= {name: list(others) for name, others in base.others.items()}
    is_xl = len(text_parts(base)) == 2
    more = {"force_zeros_for_empty_prompt": True} if is_xl else {
        "requires_safety_checker": False, "safety_checker": [None, None],
    }  # fmt: skip
    found = embedders(params)
    refuse_other_states(found)
    return {
        "": {
            "_class_name": base.pipeline,
            "_diffusers_version": LAYOUT,
            "feature_extractor": [None, None],
            **more,
            **dict(sorted(classes.items())),
        },
        base.parts["unet"].folder: {"_class_name": base.parts["unet"].cls, **_unet(params)},
        base.parts["vae"].folder: {
            "_class_name": base.parts["vae"].cls,
            **_vae(params),
            # SDXL's decoder overflows in float16
            **({"force_upcast": True} if is_xl else {}),
        },
        **{part.folder: _text(found, name, part) for name, part in text_parts(base).items()},
        "scheduler": _scheduler(params, base),
    }


def _unet(params: Mapping[str, Any]) -> dict[str, Any]:
    unet = (params.get("network_config") or params["unet_config"])["params"]
    mult, rates = unet.get("channel_mult", [1, 2, 4, 8]), unet["attention_resolutions"]
    attends = [2**level in rates for level in range(len(mult))]
    own_heads = heads(unet)
    return {
        "act_fn": "silu",
        # this is diffusers' historical name for the number of heads
        "attention_head_dim": own_heads[0] if len(set(own_heads)) == 1 else own_heads,
        "use_linear_projection": unet.get("use_linear_in_transformer", False),
        "block_out_channels": [unet["model_channels"] * m for m in mult],
        "cross_attention_dim": unet["context_dim"],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "layers_per_block": unet["num_res_blocks"],
        "norm_eps": 1e-5,
        "norm_num_groups": unet.get("norm_num_groups", 32),
        "sample_size": params.get("image_size", 64),
        "transformer_layers_per_block": unet.get("transformer_depth", 1),
        **_labels(unet, params),
    }


def _labels(unet: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """SDXL's vector: the pooled text and the sinusoidal values of sizes. Raises `InputError` for other labels."""
    if (labels := unet.get("num_classes")) is None:
        return {}
    entries = ((params.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    sizes = [one["params"]["outdim"] for one in entries if str(one.get("target")).endswith("ConcatTimestepEmbedderND")]
    if labels != "sequential" or len(sizes) != 3 or len(set(sizes)) != 1:
        raise InputError(f"diffusers has no counterpart of num_classes {short(labels)} with {len(sizes)} sizes")
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": sizes[0],
        "projection_class_embeddings_input_dim": unet["adm_in_channels"],
    }


def _vae(params: Mapping[str, Any]) -> dict[str, Any]:
    vae = params["first_stage_config"]["params"]
    dd = vae["ddconfig"]
    if dd.get("attn_resolutions") or "embed_dim" not in vae:
        raise InputError("only KL autoencoders without attention at their levels have a counterpart in diffusers")
    return {
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
    }


def _text(found: Mapping[str, Embedder], name: str, part: Part) -> dict[str, Any]:
    if name not in found:
        raise InputError(f"this config has no {name.replace('_', ' ')} that diffusers could hold")
    if found[name].is_open_clip != (part.spelling == "open_clip"):
        raise InputError(f"diffusers has no counterpart of {found[name].target} as {name}")
    return {
        "architectures": [part.cls],
        "model_type": "clip_text_model",
        # transformers would else load the dtype of the file while diffusers loads float32, which do not mix
        "torch_dtype": "float32",
        **found[name].json(),
    }


def _scheduler(params: Mapping[str, Any], base: Base) -> dict[str, Any]:
    """The schedule. Raises `InputError` for one that diffusers lacks."""
    own = schedule(params)
    zero, name = bool(own["zero_terminal_snr"]), base.others["scheduler"][1]
    if own["beta_schedule"] not in BETAS:
        raise InputError(
            f"diffusers has no counterpart of the beta_schedule {own['beta_schedule']!r}; expected {', '.join(BETAS)}"
        )
    more = {"skip_prk_steps": True} if name == "PNDMScheduler" else {"timestep_spacing": "leading"}
    more = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero else more
    return {
        "_class_name": "DDIMScheduler" if zero else name,
        "beta_start": own["linear_start"],
        "beta_end": own["linear_end"],
        "beta_schedule": BETAS[own["beta_schedule"]],
        "clip_sample": False,
        "num_train_timesteps": own["timesteps"],
        "prediction_type": PREDICTIONS[own["parameterization"]],
        "set_alpha_to_one": False,
        "steps_offset": 1,
        **more,
    }


# --- folders


def write_folder(
    path: str | Path, weights: Mapping[str, Tensor], params: Mapping[str, Any], source: str = "the checkpoint"
) -> None:
    """Write a diffusers folder for the weights of a model and `model.params` of its config. Atomic.

    Raises `InputError` for a model that diffusers does not have, and for a config of another model.
    """
    base = base_of_layout(weights)
    refuse_parts(weights, base, source)
    _compare(weights, params, source, base)
    configs, found = configurations(params, base), embedders(params)
    layers = {name: configs[part.folder]["num_hidden_layers"] for name, part in text_parts(base).items()}
    parts = to_diffusers(weights, source, base, layers)
    with ExitStack() as open_folders, atomic_write(path) as beside:
        for name in text_parts(base):
            place = name.replace("text_encoder", "tokenizer")
            tokenizer = open_folders.enter_context(found[name].tokenizer())
            if tokenizer is None:
                configs[""][place] = [None, None]
                log.warning("%s will have no tokenizer: name its folder in the text encoder's params.tokenizer", path)
            else:
                save_tokenizer(beside / place, tokenizer, found[name])
        save_json(beside / "model_index.json", configs.pop(""))
        for part, config in configs.items():
            name = "scheduler_config.json" if part == "scheduler" else "config.json"
            save_json(beside / part / name, config)
        for part, tensors in parts.items():
            place = base.parts[part]
            save_safetensors(beside / place.folder / f"{place.file}.safetensors", tensors, {"format": "pt"})


def _compare(weights: Mapping[str, Tensor], params: Mapping[str, Any], source: str, base: Base) -> None:
    """Raises `InputError` if the weights do not fit the config, from which the folder's JSON files are made."""
    model = layers.skeleton({"model": {"target": _target(params), "params": params}})
    prefixes = tuple(part.prefix for part in base.parts.values())
    wanted, found = (
        {n: list(v.shape) for n, v in state.items() if n.startswith(prefixes)}
        for state in (model.state_dict(), weights)
    )
    names = [name for name in wanted | found if not is_ignored(name)]  # some versions omit them
    if wrong := [name for name in names if wanted.get(name) != found.get(name)]:
        theirs, ours = (side.get(wrong[0], "none") for side in (found, wanted))
        error = InputError(
            f"{source} does not fit this config: {wrong[0]} has shape {theirs}, the config's model {ours} "
            f"({len(wrong)} such); use the config that the checkpoint was made with"
        )
        raise explained(error, weights, source, model.state_dict())


def _target(params: Mapping[str, Any]) -> str:
    """The class of the model that `params` are for."""
    if "network_config" in params:
        return "ldm.models.diffusion.engine.DiffusionEngine"
    if "concat_keys" in params or "masked_image_key" in params:
        return "ldm.models.diffusion.inpainting.LatentInpaintDiffusion"
    return "ldm.models.diffusion.ddpm.LatentDiffusion"


def read_folder(
    path: str | Path, params: Mapping[str, Any] | None = None, ema: bool | None = None
) -> dict[str, Tensor]:
    """The weights of a diffusers folder under the names of the model here, that of `model.params` if it is given.

    The folder may lack its autoencoder or text encoders. `ema`: see `base_choice.Choice`. Raises `InputError`.
    """
    path = Path(path)
    if not is_folder(path):
        raise InputError(f"{path} is not a diffusers model: expected a folder with model_index.json")
    pipeline = _pipeline(path / "model_index.json")
    rows = [base for base in BASES if base.pipeline and base.pipeline == pipeline]
    base = _row(rows, path, params) if rows else DEFAULT
    try:
        variants = choose(path / "unet", base.parts["unet"], ema)
        there = {name: part for name, part in base.parts.items() if name == "unet" or (path / part.folder).is_dir()}
        parts = {name: read_part(path / part.folder, part, variants) for name, part in there.items()}
        return from_diffusers(parts, str(path), base)
    except InputError as error:
        if rows or not pipeline:
            raise
        known = ", ".join(dict.fromkeys(base.pipeline for base in BASES if base.pipeline))
        raise InputError(f"{path} is a folder of {short(pipeline)}; expected one of {known} ({error})") from None


def _row(rows: Sequence[Base], path: Path, params: Mapping[str, Any] | None) -> Base:
    """The base of a pipeline whose text encoder has the names of the config's, or those that the JSON speaks for.

    OpenCLIP's towers have the exact GELU, those of CLIP have their own.
    """
    found = embedders(params or {}).get("text_encoder")
    file = path / "text_encoder" / "config.json"
    if found is None and file.is_file():
        json = read_json(file)
        is_open = isinstance(json, Mapping) and json.get("text_config", json).get("hidden_act") == "gelu"
    else:
        is_open = found is not None and found.is_open_clip
    spelling = "open_clip" if is_open else "clip"
    return next((base for base in rows if base.parts["text_encoder"].spelling == spelling), rows[0])


def _pipeline(index: Path) -> str | None:
    """The pipeline's name, which only selects a row of our table; None if it cannot be read."""
    try:
        found = read_json(index)
    except InputError:
        return None
    name = found.get("_class_name") if isinstance(found, Mapping) else None
    return name if isinstance(name, str) else None


def base_of_layout(weights: Mapping[str, Tensor]) -> Base:
    """The base that defines the folder layout for weights: their own, else one with the same parts, else SD v1."""
    base = base_of(weights)
    if base and base.pipeline:
        return base
    channels = tuple(getattr(weights.get(FIRST_LAYER), "shape", ()))[1:2]
    alike = [
        row
        for row in BASES
        if row.pipeline
        and row.marks[FIRST_LAYER][1:2] == channels
        and all(any(name.startswith(part.prefix) for name in weights) for part in row.parts.values())
    ]
    return alike[0] if alike else DEFAULT


def is_folder(path: str | Path) -> bool:
    """Whether a path is a diffusers model folder."""
    return (Path(path) / "model_index.json").is_file()


# --- the row


def _read(file: Opened, context: Context) -> Mapping[str, Tensor]:
    params = None if context.config is None else context.params
    weights, others = context.completed(read_folder(file.path, params, context.ema), file.given)
    if params is not None:
        check(file.path, params, file.given, others)
    return context.checked(weights, file.given)


def _write(path: Path, weights: Mapping[str, Tensor], context: Context) -> None:
    write_folder(path, weights, context.params, context.source)


FOLDER = Codec(
    lambda file: file.path.is_dir() and is_folder(file.path),
    {"model": _read},
    _write,
    notes=lambda file: of_folder(file.path),
)
