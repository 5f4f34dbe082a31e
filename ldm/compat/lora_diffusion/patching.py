"""Puts LoRAs into a model, trains, adds and folds them, and removes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.compat.lora_diffusion.layers import (
    ANYWHERE,
    DEFAULT_TARGET_REPLACE,
    INJECTED,
    UNET_EXTENDED_TARGET_REPLACE,
    LoraInjected,
    injected,
    pairs_of,
    replace,
    targets,
)
from ldm.errors import InputError
from ldm.interchange.cloneofsimo import read_list
from ldm.interchange.lora import Factors, delta

log = logging.getLogger(__name__)

Learning = list[Iterator[nn.Parameter]]
Loras = Sequence[Tensor] | str | Path


def inject_trainable_lora(
    model: nn.Module,
    target_replace_module: Collection[str] = DEFAULT_TARGET_REPLACE,
    r: int = 4,
    loras: Loras | None = None,
    verbose: bool = False,
    dropout_p: float = 0.0,
    scale: float = 1.0,
) -> tuple[Learning, list[str]]:
    """Add a trainable branch to the linear layers inside modules of some classes.

    loras: the initial factors, a list [up, down, ...] or the path of a `.pt` file with one.
    Returns iterators over the trainable parameters, two for each layer, and the layers' names within their modules. It
    does not freeze the rest of the model: call `model.requires_grad_(False)` first.
    """
    return _inject(model, target_replace_module, r, loras, (nn.Linear,), verbose, dropout_p, scale)


def inject_trainable_lora_extended(
    model: nn.Module,
    target_replace_module: Collection[str] = UNET_EXTENDED_TARGET_REPLACE,
    r: int = 4,
    loras: Loras | None = None,
) -> tuple[Learning, list[str]]:
    """The same for convolutions too; the branches have a dropout of 0.1, as in the published function."""
    return _inject(model, target_replace_module, r, loras, tuple(INJECTED), False, 0.1, 1.0)


def _inject(
    model: nn.Module, classes: Collection[str], r: int, loras: Loras | None, kinds: Sequence[type], verbose: bool,
    dropout_p: float, scale: float,
) -> tuple[Learning, list[str]]:  # fmt: skip
    plain = {name: layer for name, layer in targets(model, classes, kinds).items() if type(layer) in kinds}
    if not plain:
        raise InputError(f"found no layer for a LoRA inside modules of the classes {', '.join(sorted(classes))}")
    starts = None if loras is None else _fitting(tensors_of(loras), plain, "loras")
    learning: Learning = []
    for name, layer in plain.items():
        if verbose:
            log.info("LoRA beside %s, weight %s", name, list(layer.weight.shape))
        one = INJECTED[type(layer)].around(layer, r, dropout_p, scale)
        if starts:
            one.set_factors(*starts[name])
        for factor in (one.lora_up, one.lora_down):
            factor.requires_grad_(True)
            learning.append(factor.parameters())
        replace(model, name, one)
    return learning, [name.rpartition(".")[2] for name in plain]


def tensors_of(loras: Loras) -> list[Tensor]:
    """A list [up, down, ...], read from a `.pt` file if a path is given; files are never unpickled."""
    if isinstance(loras, (str, Path)):
        return [tensor for one in read_list(loras) for tensor in (one.up, one.down)]
    return list(loras)


def _fitting(
    loras: Sequence[Tensor], layers: dict[str, nn.Module], what: str
) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """The (up, down) of each layer. Raises `InputError` if numbers or shapes differ, before anything is changed."""
    pairs = list(pairs_of(loras))
    if len(pairs) != len(layers):
        raise InputError(f"{what}: {len(pairs)} pairs of factors for a model with {len(layers)} layers to change")
    for number, ((up, down), (name, layer)) in enumerate(zip(pairs, layers.items(), strict=True)):
        shape = layer.weight.shape
        if up.flatten(1).shape != (shape[0], len(down)) or down.shape[1:] != shape[1:]:
            raise InputError(
                f"{what}: factors {number} of shapes {list(up.shape)}, {list(down.shape)} do not fit {name} "
                f"({list(shape)}): the LoRA was made for another model or other classes"
            )
    return dict(zip(layers, pairs, strict=True))


def monkeypatch_or_replace_lora(
    model: nn.Module,
    loras: Loras,
    target_replace_module: Collection[str] = DEFAULT_TARGET_REPLACE,
    r: int | Sequence[int] | None = None,
) -> None:
    """Put a LoRA into a model, replacing an existing one. Ranks are those of the tensors; `r` is unused.

    Raises `InputError` for a LoRA that does not fit; then the model does not change.
    """
    _patch(model, loras, target_replace_module, (nn.Linear,))


monkeypatch_lora = monkeypatch_replace_lora = monkeypatch_or_replace_lora


def monkeypatch_or_replace_lora_extended(
    model: nn.Module,
    loras: Loras,
    target_replace_module: Collection[str] = UNET_EXTENDED_TARGET_REPLACE,
    r: int | Sequence[int] | None = None,
) -> None:
    """The same for convolutions too."""
    _patch(model, loras, target_replace_module, tuple(INJECTED))


def _patch(model: nn.Module, loras: Loras, classes: Collection[str], kinds: Sequence[type]) -> None:
    layers = targets(model, classes, kinds)
    for name, (up, down) in _fitting(tensors_of(loras), layers, "loras").items():
        layer = layers[name]
        one = layer if isinstance(layer, LoraInjected) else INJECTED[_kind(layer)].around(layer, len(down))
        one.set_factors(up, down)
        replace(model, name, one)


def _kind(layer: nn.Module) -> type:
    return next(kind for kind in INJECTED if isinstance(layer, kind))


def monkeypatch_add_lora(
    model: nn.Module,
    loras: Loras,
    target_replace_module: Collection[str] = DEFAULT_TARGET_REPLACE,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> None:
    """Set the factors to `alpha` times those of a LoRA plus `beta` times those in the model, ups and downs separately.

    As published, this is not the sum of the changes; `LoRAManager` and `ldm lora-add --mode sum` compute the sum.
    Raises `InputError` if the model has no LoRA, or one of other ranks.
    """
    layers = injected(model, target_replace_module)
    for name, (_, down) in (fitting := _fitting(tensors_of(loras), layers, "loras")).items():
        if len(down) != layers[name].r:
            raise InputError(f"{name} has a LoRA of rank {layers[name].r}, got one of rank {len(down)}")
    for name, pair in fitting.items():
        own = layers[name].lora_up.weight, layers[name].lora_down.weight
        layers[name].set_factors(
            *(alpha * new.to(old) + beta * old.detach() for new, old in zip(pair, own, strict=True))
        )


def monkeypatch_remove_lora(model: nn.Module) -> None:
    """Remove all branches. The layers are the original ones, with the changes of `collapse_lora`."""
    for name, one in injected(model).items():
        replace(model, name, one.layer)


def tune_lora_scale(model: nn.Module, alpha: float = 1.0) -> None:
    """Set the strength of the LoRA in a model: 0 is the model without it."""
    for one in injected(model).values():
        one.scale = alpha


def set_lora_diag(model: nn.Module, diag: Tensor) -> None:
    """Weight the components of the LoRA by `diag` [r]."""
    for one in injected(model).values():
        one.set_selector_from_diag(diag)


@torch.no_grad()
def collapse_lora(model: nn.Module, alpha: float = 1.0) -> None:
    """Fold `alpha` times the LoRA into the weights permanently. As published, `scale` is not used.

    The branch stays: call `monkeypatch_remove_lora` afterwards, or it counts twice.
    """
    for one in injected(model, ANYWHERE).values():
        change = delta(Factors(one.lora_down.weight, one.selected_up(), alpha))
        one.weight.copy_((one.weight.float() + change.to(one.weight.device)).to(one.weight.dtype))


def extract_lora_ups_down(
    model: nn.Module, target_replace_module: Collection[str] = DEFAULT_TARGET_REPLACE
) -> list[tuple[nn.Module, nn.Module]]:
    """The layers (up, down) of each branch, in the order of published files. Raises `ValueError` without any."""
    return [(one.lora_up, one.lora_down) for one in _with_lora(model, target_replace_module)]


extract_lora_up_downs = extract_lora_ups_down


def extract_lora_as_tensor(
    model: nn.Module, target_replace_module: Collection[str] = DEFAULT_TARGET_REPLACE, as_fp16: bool = True
) -> list[tuple[Tensor, Tensor]]:
    """Copies of the factors (up, down) of each branch, with the scale in `up`, in fp16 or the model's dtype."""
    pairs = [one.realize_as_lora() for one in _with_lora(model, target_replace_module)]
    return [tuple(t.half() if as_fp16 else t.clone() for t in pair) for pair in pairs]


def _with_lora(model: nn.Module, classes: Collection[str]) -> list[LoraInjected]:
    found = list(injected(model, classes).values())
    if not found:
        raise ValueError("No lora injected.")
    return found


def inspect_lora(model: nn.Module) -> dict[str, list[float]]:
    """By layer name, the mean absolute entry of the change `up @ down`."""
    return {
        name: [delta(Factors(one.lora_down.weight.detach(), one.lora_up.weight.detach())).abs().mean().item()]
        for name, one in injected(model).items()
    }


def lora_as_json(model: nn.Module, target_replace_module: Collection[str] = DEFAULT_TARGET_REPLACE) -> str:
    """The factors [up, down, ...] as JSON of nested lists."""
    pairs = extract_lora_ups_down(model, target_replace_module)
    return json.dumps([layer.weight.detach().cpu().float().tolist() for pair in pairs for layer in pair])
