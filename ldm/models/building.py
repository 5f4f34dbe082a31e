"""Builds models from a config and fills them with weights.

Parameters that are overwritten later are not initialised, so loading takes about as long as reading the file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoints import read_weights, refuse_not_finite
from ldm.config import (
    check_entries,
    find_file,
    get_obj_from_str,
    instantiate_from_config,
    parameters_of,
    plain,
)
from ldm.devices import forked_rng
from ldm.errors import InputError
from ldm.models.bases import explained, in_model_names, is_ignored, missing_part

log = logging.getLogger(__name__)


class skip_init(TorchFunctionMode):
    """Within this context, modules have uninitialised parameters. The caller must overwrite all of them."""

    INITS = ("torch.nn.init", "transformers.initialization")  # transformers replaces torch's functions by its own
    FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) in self.INITS:
            return (kwargs or {}).get("tensor", args[0] if args else None)
        if func in self.FILLS and isinstance(args[0], nn.Parameter):
            return args[0]
        return func(*args, **(kwargs or {}))


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, may_lack: Callable[[str], bool] = lambda name: False
) -> None:
    """Put all `weights` into a model, without a copy if the dtype agrees, see `filled`.

    Raises `InputError` if the model has no place for a tensor.
    """
    refuse_unknown(filled(model, weights, source, may_lack), source)


def filled(
    model: nn.Module, weights: Mapping[str, Tensor], source: str, may_lack: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Put `weights` into a model. Returns the weights that it has no place for.

    Names that models may lack (`bases.is_ignored`) are left out. Buffers may be absent from `weights`: the model has
    computed its own, or does so in `weights_loaded(absent names)`, which is called at the end. Parameters may be absent
    if `may_lack(name)`. Raises `InputError` if other parameters are absent, shapes differ or a value is not finite.
    """
    parameters = dict(model.named_parameters())
    dtypes = {name: value.dtype for name, value in (*parameters.items(), *model.named_buffers())}
    with _shapes_explained(source):
        result = model.load_state_dict(weights, strict=False, assign=True)
    unknown = [name for name in result.unexpected_keys if not is_ignored(name)]
    if lacking := [name for name in result.missing_keys if name in parameters and not may_lack(name)]:
        if part := missing_part(lacking, weights):
            raise InputError(f"{source} has no {part}")
        also = f" and holds {len(unknown)} that it has no place for ({', '.join(unknown[:3])})" if unknown else ""
        raise InputError(
            f"{source} does not fit this config: it lacks {len(lacking)} of {len(parameters)} weights "
            f"({', '.join(lacking[:3])}){also}; use the config that the checkpoint was made with"
        )
    used = {name: value for name, value in weights.items() if not is_ignored(name)}
    refuse_not_finite(used, source, "get an undamaged copy of the checkpoint")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dtype != dtypes[name]:
            value.data = value.data.to(dtypes[name])
    if hasattr(model, "weights_loaded"):
        model.weights_loaded(set(result.missing_keys))
    return {name: weights.get(name) for name in unknown}


@contextmanager
def _shapes_explained(source: str) -> Iterator[None]:
    """Within this context, errors of `load_state_dict` about shapes become one line about the first."""
    try:
        yield
    except RuntimeError as error:
        wrong = re.findall(
            r"size mismatch for ([^:]+): .*?shape (?:torch\.Size\()?(\[.*?\]).*?model is (?:torch\.Size\()?(\[.*?\])",
            str(error),
        )
        if not wrong:
            raise
        name, theirs, ours = wrong[0]
        raise InputError(
            f"{source} does not fit this config: {name} has shape {theirs}, the model wants {ours} "
            f"({len(wrong)} such); use the config that the checkpoint was made with"
        ) from None


def refuse_unknown(names: Iterable[str], source: str) -> None:
    """Raises `InputError` for names without a place in the model, except ignored names."""
    unknown = [name for name in names if not is_ignored(name)]
    if unknown:
        raise InputError(
            f"{source} holds {len(unknown)} tensors that this config has no place for ({', '.join(unknown[:3])}): use "
            "the config that the checkpoint was made with, which names its adapters, LoRA and words too"
        )


def load_base(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`load_weights` for the base of a model. Returns the tensors that belong to its tuning, for `fill_added`.

    The file may lack parameters that tuning added to the model.
    """
    weights = without_replaced(model, weights, source)
    tuning = getattr(model, "tuning", None)
    if tuning is None:
        load_weights(model, weights, source)
        return {}
    return filled(model, weights, source, may_lack=lambda name: not tuning.is_base(name))


def without_replaced(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """The weights without those of parts that the config replaces by modules without weights; logs them."""
    prefixes = tuple(f"{n}." for n, part in model.named_modules() if getattr(part, "replaces_weights", False))
    kept = {name: value for name, value in weights.items() if not name.startswith(prefixes or "\0")}
    if len(kept) < len(weights):
        log.info("%s: %s left out, which this config replaces", source, ", ".join(f"{p}*" for p in prefixes))
    return kept


def build_model(
    config: Mapping,
    ckpt: str | Path | None,
    random_seed: int | None = None,
    tuned: bool = True,
    read: Callable[[str | Path], Mapping[str, Tensor]] = read_weights,
    unet_dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model of a config with the weights of a checkpoint; if `ckpt` is None, with seeded random weights.

    `config` is a whole config; its section `model` is built. With `tuned`, its tuning is installed with initial values.
    `read` reads `ckpt`: that of `ldm.interchange.base_files.reader` reads diffusers folders, too.
    The weights of the UNet have `unet_dtype` (default: fp32), without a copy of those that a checkpoint has in it.
    Raises `InputError`.
    """
    if "model" not in config:
        raise InputError(f"the config has no 'model' section; its keys are {list(config)}")
    check_entries(plain(config["model"]), "model")
    if ckpt is None:
        with forked_rng(seed=random_seed or 0):
            model = untuned_model(config)
            reinit_zero_layers(model)
        if unet_dtype is not None:
            unet_of(model).to(unet_dtype)
        if tuned:
            tune(model)
        return model
    return filled_model(config, read(ckpt), str(ckpt), tuned, unet_dtype)


def filled_model(
    config: Mapping,
    weights: Mapping[str, Tensor],
    source: str,
    tuned: bool = True,
    unet_dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model of a config with these weights. Tuned parameters that they lack have initial values.

    `unet_dtype`: see `build_model`. Raises `InputError`; if the weights are of another base, the message names it.
    """
    with skip_init():
        model = untuned_model(config)
        if unet_dtype is not None:
            for parameter in unet_of(model).parameters():
                parameter.data = torch.empty_like(parameter, dtype=unet_dtype)  # `to` would copy what is to be replaced
    weights = in_model_names(weights)
    try:
        added = load_base(model, weights, source)
        if tuned:
            tune(model)
        fill_added(model, added, source)
    except InputError as error:
        raise explained(error, weights, source, model.state_dict()) from None
    return model


def unet_of(model: nn.Module) -> nn.Module:
    """The UNet of a diffusion model. Raises `InputError` for a model without one."""
    if not hasattr(getattr(model, "model", None), "diffusion_model"):
        raise InputError(f"{type(model).__name__} has no UNet whose precision could be set: expected a diffusion model")
    return model.model.diffusion_model


def untuned_model(config: Mapping) -> nn.Module:
    """The model of a config without its tuning, which is installed after the base weights are loaded."""
    waits = "install_tuning" in (parameters_of(get_obj_from_str(str(config["model"].get("target"))))[1] or [])
    return instantiate_from_config(config["model"], **({"install_tuning": False} if waits else {}))


def untuned(config: Any) -> Any:
    """A config without its `tuning`, for files that bring their own. Routes of position adapters stay."""
    params = config.get("model", {}).get("params", {})
    for name in ("tuning", "add_token"):
        params.pop(name, None)
    return config


def tune(model: nn.Module) -> None:
    """Install the tuning of a model that has one."""
    if hasattr(model, "tune"):
        model.tune()


@torch.no_grad()
def fill_added(model: nn.Module, added: Mapping[str, Tensor], source: str) -> None:
    """Put the tuned parameters of a whole checkpoint into a model with the same tuning."""
    if not added:
        return
    own = model.state_dict()
    refuse_unknown([name for name in added if name not in own], source)
    refuse_not_finite(added, source)
    for name, value in added.items():
        if value.shape != own[name].shape:
            raise InputError(
                f"{source} does not fit this config: {name} has shape {list(value.shape)}, the model wants "
                f"{list(own[name].shape)}; use the config that the checkpoint was made with"
            )
        own[name].copy_(value)
    log.info("%s: %d tuned tensors are loaded, too", source, len(added))


def reinit_zero_layers(model: nn.Module) -> None:
    """Replace zero layers of a random base by N(0, 1/fan_in), because zero layers block all gradients."""
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.detach().any():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def choose_checkpoint(config: Mapping, given: str | None) -> tuple[str | None, int | None]:
    """The checkpoint to start from: the given one, else the config's `checkpoint: {path, random_seed}`.

    Returns (path, None), or (None, seed) if the config's file is absent and the config allows a random base.
    Raises `InputError` otherwise.
    """
    if given:
        return given, None
    own = config.get("checkpoint") or {}
    if own.get("path") and find_file(own["path"]).is_file():
        return str(find_file(own["path"])), None
    absent = f"{own['path']} does not exist" if own.get("path") else "the config names no checkpoint"
    if own.get("random_seed") is not None:
        if chosen := [f"--{name}" for name in ("vae", "text_encoder", "ema") if own.get(name) is not None]:
            raise InputError(f"{absent}, so {chosen[0]} has no base to act on: name a checkpoint or a diffusers folder")
        log.warning("%s: starting from random base weights (seed %s)", absent, own["random_seed"])
        return None, int(own["random_seed"])
    raise InputError(
        f"{absent}: name a checkpoint or a diffusers folder with --actual_resume (training) or --ckpt (sampling)"
    )
