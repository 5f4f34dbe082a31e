"""Translates the section `lightning.trainer` of a config into arguments of Lightning 2."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from ldm import devices
from ldm.config import plain
from ldm.devices import best_device
from ldm.errors import InputError, explain

log = logging.getLogger(__name__)

PRECISIONS = {name: getattr(torch, kind) for name, kind in devices.PRECISIONS.items()}
HALVES = {"fp16": ("16", "16-mixed"), "bf16": ("bf16", "bf16-mixed")}


def trainer_options(config: DictConfig, automatic: bool = True) -> dict[str, Any]:
    """The arguments of Lightning's Trainer that a config names; `automatic`: the Trainer steps the optimizers.

    Raises `InputError` for devices that do not exist and for precisions that would round the noise schedule.
    """
    options = plain(config.get("lightning", {}).get("trainer", {}))
    gpus = options.pop("gpus", None)
    if gpus is not None:
        options |= gpu_options(gpus)
    if isinstance(options.get("devices"), str):
        options["devices"] = _devices(options["devices"])
    if not automatic:
        options = _with_own_steps(options)
    if "precision" in options:
        options["precision"] = _precision(options)
    return options


def _devices(text: str) -> str | int | list[int]:
    """`2` as a number, `0,3` as a list; other words, such as `auto`, are passed to Lightning."""
    if text.strip("0123456789, -"):
        return text
    with explain(f"--devices {text}: expected how many, or which, such as 2 or 0,3", ValueError):
        return [int(d) for d in text.split(",") if d.strip()] if "," in text else int(text)


def _with_own_steps(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for a model that steps its two optimizers itself."""
    options = dict(options)
    for name, usual in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
        if (options.get(name) or usual) != usual:
            log.warning("%s has no effect: this model steps its two optimizers itself", name)
            del options[name]
    if options.get("strategy", "auto") in ("auto", "ddp") and several_devices(options):
        options["strategy"] = "ddp_find_unused_parameters_true"  # each backward pass covers one of two networks
    return options


def _precision(options: Mapping[str, Any]) -> Any:
    """The precision of the options, or 32 bits if this machine is slow with fewer."""
    asked = str(options["precision"])
    if asked.endswith("-true") and asked != "32-true":
        raise InputError(
            f"--precision {asked} would round the noise schedule, too: use bf16-mixed or 16-mixed, "
            "with --base_precision for the frozen weights"
        )
    kind = next((kind for kind, names in HALVES.items() if asked in names), None)
    if kind is None or uses_gpu(options) or computes_on_cpu(kind):
        return options["precision"]
    log.warning("precision %s needs a GPU or another CPU; training in 32 bits", asked)
    return "32-true"


def computes_on_cpu(precision: str) -> bool:
    """Whether this CPU has fast arithmetic of that precision; emulation takes up to a hundred times longer."""
    return precision == "fp32" or (precision == "bf16" and has_bf16())


def has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def uses_gpu(options: Mapping[str, Any]) -> bool:
    return options.get("accelerator", "auto") in ("auto", "gpu", "cuda") and torch.cuda.is_available()


def several_devices(options: Mapping[str, Any]) -> bool:
    """Whether Lightning will train on more than one device."""
    devices = options.get("devices", "auto")
    if devices in ("auto", -1):
        devices = torch.cuda.device_count() if uses_gpu(options) else 1
    return (devices if isinstance(devices, int) else len(devices)) > 1 or (options.get("num_nodes") or 1) > 1


def first_device(config: DictConfig) -> torch.device:
    """The device of a run's first process, before Lightning chooses it."""
    options = trainer_options(config)
    devices = options.get("devices", "auto")
    if uses_gpu(options) and isinstance(devices, list):
        return torch.device("cuda", devices[0])
    return best_device({"cpu": "cpu", "mps": "mps"}.get(options.get("accelerator", "auto")))


def gpu_options(gpus: Any) -> dict[str, Any]:
    """`--gpus 0,3` in terms of Lightning 2. Raises `InputError` if there are no such GPUs."""
    text = str(gpus).strip()
    is_list = text.startswith(("[", "(")) or "," in text  # `[1]` and `1,` name the second GPU, `1` is a count
    try:
        numbers = [int(part) for part in text.strip("[]() ").split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise InputError(f"--gpus {gpus!r}: expected numbers of GPUs such as 0, or 0,3")
    count = torch.cuda.device_count()
    if not count:
        raise InputError(f"--gpus {gpus}: this machine has no CUDA GPU; leave --gpus out or say --accelerator cpu")
    chosen = numbers if is_list else [*range(numbers[0])] if numbers[0] >= 0 else [*range(count)]
    if not chosen or max(chosen) >= count:
        raise InputError(f"--gpus {gpus}: this machine has {count} GPUs, 0 to {count - 1}; '0,' is the first one")
    return {"accelerator": "gpu", "devices": chosen}
