"""What the JSON of a diffusers folder says that its weights do not: prediction, schedule, numbers of heads, scale.

A row of `SETTINGS` is a value in the JSON, with the default of diffusers, and its counterpart in `model.params` of a
config. So a folder can be compared with a config, and a config can be set to be that of a folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.config import plain
from ldm.errors import InputError, short
from ldm.files import read_json
from ldm.interchange.text_encoders import embedders

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}  # by LDM's `parameterization`
SCHEDULE = {
    "parameterization": "eps", "zero_terminal_snr": False, "beta_schedule": "linear", "linear_start": 1e-4,
    "linear_end": 2e-2, "timesteps": 1000,
}  # fmt: skip
SCALINGS = {"eps": "EpsScaling", "v": "VScaling"}
# Parameters of SDXL's engine, and the value in them
ENGINE: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "parameterization": (
        "denoiser_config.params.scaling_config.target",
        lambda value: f"sgm.modules.diffusionmodules.denoiser_scaling.{SCALINGS[value]}",
    ),
    "linear_start": ("denoiser_config.params.discretization_config.params.linear_start", lambda value: value),
    "linear_end": ("denoiser_config.params.discretization_config.params.linear_end", lambda value: value),
}
BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear"}  # by LDM's `beta_schedule`

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """A row: a key of a part's JSON.

    default: diffusers' own
    ours: the value for `model.params` of a config; None if the config has no such part
    read: the value in the JSON in that form, from the whole JSON and the config
    change: the parameters that give a config this value; empty if there are none
    """

    part: str
    key: str
    default: Any
    ours: Callable[[Params], Any]
    change: Callable[[Any, Params], dict[str, Any]] = lambda value, params: {}
    read: Callable[[Mapping[str, Any], Params, Setting], Any] = lambda json, params, row: json.get(row.key, row.default)


def _unet(params: Params) -> Mapping[str, Any]:
    return (params.get("unet_config") or params.get("network_config") or {}).get("params") or {}


def _unet_key(params: Params) -> str:
    return f"{'network' if 'network_config' in params else 'unet'}_config.params"


def _first_stage(params: Params) -> Mapping[str, Any]:
    return ((params.get("first_stage_config") or {}).get("params") or {}).get("ddconfig") or {}


def _constant(value: Any) -> Callable[[Params], Any]:
    """The model here has one value."""
    return lambda params: value


def schedule(params: Params) -> dict[str, Any]:
    """What a config says of its schedule, by the parameters of `LatentDiffusion`, also for SDXL's engine."""
    if "denoiser_config" not in params:
        return {key: params.get(key, value) for key, value in SCHEDULE.items()}
    denoiser = params["denoiser_config"].get("params") or {}
    own = (denoiser.get("discretization_config") or {}).get("params") or {}
    scaling = str((denoiser.get("scaling_config") or {}).get("target")).rpartition(".")[2]
    return {
        "parameterization": {"EpsScaling": "eps", "VScaling": "v"}.get(scaling, scaling),
        "zero_terminal_snr": False,
        "beta_schedule": "linear",
        "linear_start": own.get("linear_start", 0.00085),
        "linear_end": own.get("linear_end", 0.012),
        "timesteps": own.get("num_timesteps", 1000),
    }


def _of_schedule(key: str, names: Mapping[Any, str] | None = None) -> Callable[[Params], Any]:
    return lambda params: (names or {}).get(value := schedule(params)[key], value)


def _set_schedule(
    key: str, kinds: tuple[type, ...] = (int, float), names: Mapping[str, str] | None = None
) -> Callable[[Any, Params], dict[str, Any]]:
    """The parameter of a value; for SDXL's engine only the prediction and the betas have one."""
    ours = {theirs: own for own, theirs in (names or {}).items()}

    def change(value: Any, params: Params) -> dict[str, Any]:
        value = ours.get(value) if names else value
        if value is None or not isinstance(value, kinds):
            return {}
        if "denoiser_config" not in params:
            return {key: value}
        inside = ENGINE.get(key)
        return {} if inside is None or (key, value) == ("parameterization", "x0") else {inside[0]: inside[1](value)}

    return change


def _of_text(part: str, key: str) -> Callable[[Params], Any]:
    """A value of the configuration of a text encoder; None if the model has no such part."""

    def value(params: Params) -> Any:
        found = embedders(params).get(part)
        return None if found is None else found.json().get(key)

    return value


def heads(unet: Mapping[str, Any]) -> list[int]:
    """The number of attention heads at every level of a UNet, finest first, from the parameters of its config."""
    widths = [unet.get("model_channels", 320) * mult for mult in unet.get("channel_mult", (1, 2, 4, 8))]
    wide = unet.get("num_head_channels", -1)
    return [unet.get("num_heads", -1) if wide == -1 else width // wide for width in widths]


def _attending(unet: Mapping[str, Any]) -> list[int]:
    """The levels with attention; the middle block has that of the last level."""
    levels, rates = len(unet.get("channel_mult", (1, 2, 4, 8))), unet.get("attention_resolutions", ())
    return [level for level in range(levels) if 2**level in rates or level == levels - 1]


def _our_heads(params: Params) -> list[int] | None:
    unet = _unet(params)
    return [heads(unet)[level] for level in _attending(unet)] if unet else None


def _their_heads(json: Mapping[str, Any], params: Params, row: Setting) -> Any:
    """diffusers calls the number of heads `attention_head_dim`, for historical reasons."""
    value, unet = json.get("num_attention_heads") or json.get(row.key, row.default), _unet(params)
    levels = len(heads(unet))
    value = [value] * levels if isinstance(value, int) else value
    return [value[level] for level in _attending(unet)] if isinstance(value, list) and len(value) == levels else value


def _set_heads(value: Any, params: Params) -> dict[str, Any]:
    """One number for all levels, or one width of a head."""
    if not isinstance(value, list) or not all(isinstance(one, int) and one > 0 for one in value):
        return {}
    unet, key = _unet(params), _unet_key(params)
    widths = [unet["model_channels"] * unet["channel_mult"][level] for level in _attending(unet)]
    if len(set(value)) == 1:
        return {f"{key}.num_heads": value[0], f"{key}.num_head_channels": -1}
    [*sizes] = {width // one for width, one in zip(widths, value, strict=True)}
    return {f"{key}.num_head_channels": sizes[0]} if len(sizes) == 1 else {}


def _set(key: str, kinds: tuple[type, ...] = (int, float)) -> Callable[[Any, Params], dict[str, Any]]:
    return lambda value, params: {key: value} if isinstance(value, kinds) else {}


def _set_unet(key: str, kinds: tuple[type, ...]) -> Callable[[Any, Params], dict[str, Any]]:
    return lambda value, params: {f"{_unet_key(params)}.{key}": value} if isinstance(value, kinds) else {}


SCHEDULER = "scheduler"
SETTINGS = [
    Setting(
        SCHEDULER, "prediction_type", "epsilon", _of_schedule("parameterization", PREDICTIONS),
        _set_schedule("parameterization", (str,), PREDICTIONS),
    ),
    Setting(
        SCHEDULER, "rescale_betas_zero_snr", False, _of_schedule("zero_terminal_snr"),
        _set_schedule("zero_terminal_snr", (bool,)),
    ),
    Setting(
        SCHEDULER, "beta_schedule", "linear", _of_schedule("beta_schedule", BETAS),
        _set_schedule("beta_schedule", (str,), BETAS),
    ),
    Setting(SCHEDULER, "beta_start", 1e-4, _of_schedule("linear_start"), _set_schedule("linear_start")),
    Setting(SCHEDULER, "beta_end", 2e-2, _of_schedule("linear_end"), _set_schedule("linear_end")),
    Setting(SCHEDULER, "num_train_timesteps", 1000, _of_schedule("timesteps"), _set_schedule("timesteps", (int,))),
    Setting(SCHEDULER, "trained_betas", None, _constant(None)),
    Setting("unet", "attention_head_dim", 8, _our_heads, _set_heads, _their_heads),
    Setting(
        "unet", "use_linear_projection", False, lambda p: bool(_unet(p).get("use_linear_in_transformer", False)),
        _set_unet("use_linear_in_transformer", (bool,)),
    ),
    Setting(
        "unet", "norm_num_groups", 32, lambda p: _unet(p).get("norm_num_groups", 32),
        _set_unet("norm_num_groups", (int,)),
    ),
    *(
        Setting("unet", key, value, _constant(value))
        for key, value in {
            "act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
            "center_input_sample": False, "time_embedding_type": "positional", "resnet_time_scale_shift": "default",
            "mid_block_scale_factor": 1, "only_cross_attention": False, "dual_cross_attention": False,
            "encoder_hid_dim_type": None,
        }.items()
    ),
    Setting("vae", "scaling_factor", 0.18215, lambda p: p.get("scale_factor", 1.0), _set("scale_factor")),
    Setting(
        "vae", "norm_num_groups", 32, lambda p: _first_stage(p).get("norm_num_groups", 32),
        _set("first_stage_config.params.ddconfig.norm_num_groups", (int,)),
    ),
    *(
        Setting("vae", key, value, _constant(value))
        for key, value in {"shift_factor": None, "latents_mean": None, "latents_std": None}.items()
    ),
    *(
        Setting(part, key, value, _of_text(part, key))
        for part in ("text_encoder", "text_encoder_2")
        for key, value in {"hidden_act": "quick_gelu", "num_attention_heads": 8}.items()
    ),
]  # fmt: skip


def differences(
    folder: Path, params: Any, without: Collection[str] = (), places: Mapping[str, Path] | None = None
) -> list[tuple[Setting, Any, Any]]:
    """(row, the folder's value, the config's) of every setting in which a folder and `model.params` differ.

    `without`: parts that are not asked for; `places`: the folders of parts, if they are not those of their names.

    Raises `InputError` for JSON that cannot be read and for schedules without betas.
    """
    params, found, read = plain(params), [], {}
    for row in SETTINGS:
        if row.part in without:
            continue
        if row.part not in read:
            read[row.part] = _json((places or {}).get(row.part, folder / row.part), row.part)
        json, ours = read[row.part], row.ours(params)
        if json is None or (ours is None and row.default is not None):
            continue
        theirs = row.read(json, params, row)
        if not _same(theirs, ours):
            found.append((row, theirs, ours))
    return found


def check(folder: Path, params: Any, given: str | Path, without: Collection[str] = ()) -> None:
    """Raises `InputError` if the JSON of a folder, `given` by that name, describes another model than `params`."""
    _refuse(differences(folder, params, without), params, given)


def check_part(folder: Path, part: str, params: Any, given: str | Path) -> None:
    """The same for the folder of one part."""
    others = {row.part for row in SETTINGS} - {part}
    _refuse(differences(folder, params, others, {part: folder}), params, given)


def _refuse(found: Iterable[tuple[Setting, Any, Any]], params: Any, given: str | Path) -> None:
    for row, theirs, ours in found:
        change = row.change(theirs, plain(params))
        advice = ", ".join(f"model.params.{key}={value}" for key, value in change.items())
        raise InputError(
            f"{given} says {row.key} {short(theirs)} in {row.part}, and the model of this config has {short(ours)}: "
            + (f"use a config with {advice}" if change else "this program has no such model")
        )


def adapted(folder: Path, params: Any, given: str | Path, without: Collection[str] = ()) -> dict[str, Any]:
    """The parameters, by dotted key within `model.params`, that make a config that of a folder.

    Raises `InputError` for a folder that no parameters describe.
    """
    changes: dict[str, Any] = {}
    for row, theirs, _ in differences(folder, params, without):
        if not (change := row.change(theirs, plain(params))):
            raise InputError(f"{given} says {row.key} {short(theirs)} in {row.part}: this program has no such model")
        changes |= change
    return changes


def of_folder(folder: Path) -> dict[str, Any]:
    """What `ldm inspect` tells of the JSON: prediction and schedule, where they differ from diffusers' defaults."""
    json = _json(folder / SCHEDULER, SCHEDULER) or {}
    told = {key: json[key] for key in ("prediction_type", "rescale_betas_zero_snr") if json.get(key)}
    return {key.replace("_", " "): value for key, value in told.items()}


def _json(folder: Path, part: str) -> Mapping[str, Any] | None:
    """The JSON of a part; None if the folder has none, which older versions of diffusers do not need for all parts."""
    file = folder / ("scheduler_config.json" if part == SCHEDULER else "config.json")
    if not file.is_file():
        return None
    json = read_json(file)
    if not isinstance(json, Mapping):
        raise InputError(f"{file}: expected a mapping, got {short(json)}")
    json = json.get("text_config", json) if part.startswith("text_encoder") else json
    if part == SCHEDULER and any(word in str(json.get("_class_name")) for word in ("FlowMatch", "EDM")):
        raise InputError(f"{file}: {json['_class_name']} is not a schedule of betas, which this program's models have")
    return json


def _same(one: Any, two: Any) -> bool:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (one, two))
    return math.isclose(one, two, rel_tol=1e-6) if numbers else one == two
