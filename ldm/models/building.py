"""Models built from a config and filled with weights.

A model is built without initialising what is then overwritten, so that loading costs about what reading costs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoints import is_adapter, is_added, read_weights, refuse_not_finite
from ldm.config import check_entries, find_file, instantiate_from_config, plain
from ldm.errors import InputError

log = logging.getLogger(__name__)


# Names in released checkpoints that a model need not have: averages, constants of the schedule, position ids, losses
# and discriminators of autoencoders, and the scale of CLIP's contrast. Patterns are matched whole.
BOOKKEEPING = re.compile(
    r"(.*\.)?(model_ema\..+|loss\..+|position_ids|logit_scale|attn_mask|scale_factor|logvar|lvlb_weights"
    r"|betas|alphas_cumprod(_prev)?|sqrt_(one_minus_)?alphas_cumprod|log_one_minus_alphas_cumprod"
    r"|sqrt_recip(m1)?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|denoiser\.sigmas"
    r"|global_step|num_updates|cond_ids|ddim_\w+)"
)


class skip_init(TorchFunctionMode):
    """Within this context modules are built with uninitialised parameters: the caller overwrites every one of them.

    `load_weights` does, and calls `reset_parameters` for those that it was allowed to miss.
    """

    INITS = ("torch.nn.init", "transformers.initialization")  # transformers puts its functions in the place of torch's
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
    """Put `weights` into a model, without copying where the dtype is the model's.

    Of names that the model does not have, `BOOKKEEPING` is left out. Buffers may be absent: the model has
    computed its own, or does so when its `weights_loaded(names of what is absent)` is called at the end. Parameters may
    be absent if `may_lack(name)`; their modules are then initialised by `reset_parameters`.
    Raises `InputError`, with the first few names, if other parameters are absent, shapes differ, the model has no place
    for a tensor, or one is not finite.
    """
    parameters = dict(model.named_parameters())
    dtypes = {name: value.dtype for name, value in (*parameters.items(), *model.named_buffers())}
    try:
        result = model.load_state_dict(weights, strict=False, assign=True)
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
    lacking = [name for name in result.missing_keys if name in parameters]
    if unexpected := [name for name in lacking if not may_lack(name)]:
        unknown = [name for name in result.unexpected_keys if not BOOKKEEPING.fullmatch(name)]
        also = f" and holds {len(unknown)} that it has no place for ({', '.join(unknown[:3])})" if unknown else ""
        raise InputError(
            f"{source} does not fit this config: it lacks {len(unexpected)} of {len(parameters)} weights "
            f"({', '.join(unexpected[:3])}){also}; use the config that the checkpoint was made with"
        )
    refuse_unknown(result.unexpected_keys, source)
    used = {name: value for name, value in weights.items() if not BOOKKEEPING.fullmatch(name)}
    refuse_not_finite(used, source, "get an undamaged copy of the checkpoint")
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.dtype != dtypes[name]:
            value.data = value.data.to(dtypes[name])
    reset(model, {name for name in lacking if is_adapter(name) or not is_added(name)})
    if hasattr(model, "weights_loaded"):
        model.weights_loaded(set(result.missing_keys))


def refuse_unknown(names: Iterable[str], source: str) -> None:
    """Raises `InputError` for names of weights that a model has no place for and that are no `BOOKKEEPING`."""
    unknown = [name for name in names if not BOOKKEEPING.fullmatch(name)]
    if added := [name for name in unknown if is_added(name)]:
        raise InputError(
            f"{source} also holds {len(added)} tensors of adapters, LoRA or new words that this config has no place "
            f"for ({', '.join(added[:3])}): use the config that it was trained with, or a checkpoint of the base alone"
        )
    if unknown:
        raise InputError(
            f"{source} holds {len(unknown)} tensors that this config has no place for ({', '.join(unknown[:3])}): use "
            "the config that the checkpoint was made with, or take them out of the file"
        )


def reset(model: nn.Module, names: set[str]) -> None:
    """Initialise the named parameters, by the outermost module that has `reset_parameters` and owns only such ones."""
    left = set(names)
    for prefix, module in model.named_modules():
        owned = {f"{prefix}.{name}" if prefix else name for name, _ in module.named_parameters()}
        if owned & left and owned <= names and hasattr(module, "reset_parameters"):
            module.reset_parameters()
            left -= owned
    assert not left, f"no module can initialise {sorted(left)}"


BASE_IS_COMING: ContextVar[bool] = ContextVar("BASE_IS_COMING", default=False)


@contextmanager
def base_is_coming() -> Iterator[None]:
    """Within this context models are built without their tuning, which starts from weights that are loaded afterwards.

    Whoever has loaded them calls `model.tune()`.
    """
    token = BASE_IS_COMING.set(True)
    try:
        yield
    finally:
        BASE_IS_COMING.reset(token)


def build_model(config: Mapping, ckpt: str | Path | None, random_seed: int | None = None) -> nn.Module:
    """The model of a config with the weights of a checkpoint, or with seeded random ones where `ckpt` is None.

    `config` is a whole config (its `model` is built). What its tuning adds starts fresh. Raises `InputError`.
    """
    if "model" not in config:
        raise InputError(f"the config has no 'model' section; its keys are {list(config)}")
    check_entries(plain(config["model"]), "model")
    if ckpt is None:
        with torch.random.fork_rng(devices=[]), base_is_coming():
            torch.manual_seed(random_seed or 0)
            model = instantiate_from_config(config["model"])
            fill_zeros(model)
        reset(model, set(filter(is_adapter, dict(model.named_parameters()))))
    else:
        weights = read_weights(ckpt)
        with skip_init(), base_is_coming():
            model = instantiate_from_config(config["model"])
        own = model.state_dict().keys()
        added = {name: value for name, value in weights.items() if is_added(name) and name not in own}
        base = {name: value for name, value in weights.items() if name not in added}
        load_weights(model, base, source=str(ckpt), may_lack=is_added)
    if hasattr(model, "tune"):
        model.tune()
    if ckpt is not None and added:
        _fill_added(model, added, str(ckpt))
    return model


@torch.no_grad()
def _fill_added(model: nn.Module, added: Mapping[str, Tensor], source: str) -> None:
    """Put what tuning added to the model of a whole checkpoint into a model that its config tunes in the same way."""
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
    log.info("%s: %d tensors of what was tuned are loaded, too", source, len(added))


def fill_zeros(model: nn.Module) -> None:
    """Give a random base what training would: layers that start at zero block every gradient; draw N(0, 1/fan_in)."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not is_adapter(name) and not parameter.detach().any():
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)


def choose_checkpoint(config: Mapping, given: str | None) -> tuple[str | None, int | None]:
    """Which checkpoint to start from: the one given, else the config's `checkpoint: {path, random_seed}`.

    Returns (path, None), or (None, seed) where the config's own file is absent and it allows a random base.
    Raises `InputError` where there is neither.
    """
    if given:
        return given, None
    own = config.get("checkpoint") or {}
    if own.get("path") and find_file(own["path"]).is_file():
        return str(find_file(own["path"])), None
    absent = f"{own['path']} does not exist" if own.get("path") else "the config names no checkpoint"
    if own.get("random_seed") is not None:
        log.warning("%s: starting from random base weights (seed %s)", absent, own["random_seed"])
        return None, int(own["random_seed"])
    raise InputError(
        f"{absent}: name a .ckpt or .safetensors file with --actual_resume (training) or --ckpt (sampling)"
    )
