"""The report of `ldm plan`: the cost of a step, and the switches that make a training fit into memory."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config import plain, unet_params
from ldm.errors import InputError
from ldm.train.footprint import Footprint, measure
from ldm.train.gpus import gpu, seconds
from ldm.train.run_config import opened, with_trainer

GIB = 2**30
OVERHEAD = 0.6  # GiB of a CUDA context, its libraries and allocator fragmentation; it differs between machines
REACHED = 0.4  # the fraction of a GPU's peak rates that training of diffusion models usually reaches

# Switches that save memory, the cheapest first: name, and the settings that it changes.
SWITCHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--cache memory", {"cache": True}),
    ("--base_precision bf16", {"base_precision": "bf16"}),
    ("{unet}.use_checkpoint=true", {"use_checkpoint": True}),
    ("data.params.batch_size=1", {"batch_size": 1}),
    ("data.params.reg=null (no class pictures)", {"reg": False}),
)


def report(options: argparse.Namespace, trainer_options: dict[str, Any], overrides: list[str]) -> str:
    """The cost of a training, as lines of text or as JSON. Raises `InputError`."""
    config, *_ = opened(options, overrides, trainer_options)
    config = with_trainer(config, options.gpus, trainer_options)
    stored = {"cache": "memory", "base_precision": "fp32", **(config.get("dreambooth") or {})}
    settings = {
        "cache": (options.cache or stored["cache"]) != "off",
        "base_precision": options.base_precision or stored["base_precision"],
    }
    found = footprint(config, settings)
    limit = options.memory or (gpu(options.gpu).memory if options.gpu else None)
    if options.json:
        numbers = {key: value for key, value in vars(found).items() if key != "calls"}
        extra = {"activations": found.activations, "traffic": sum(size for _, size in found.calls)}
        timed = {"seconds_floor": seconds(found.calls, gpu(options.gpu))} if options.gpu else {}
        return json.dumps({**numbers, **extra, **timed})
    lines = [*in_words(found), *_length(config, found, options.gpu)]
    if limit is not None:
        lines += fitting(config, settings, found, limit)
    return "\n".join(lines)


def footprint(config: DictConfig, settings: Mapping[str, Any]) -> Footprint:
    """The footprint of a step of a config, with some of the settings of `SWITCHES`."""
    config = OmegaConf.create(plain(config))
    if settings.get("use_checkpoint"):
        OmegaConf.update(config, f"{unet_params(config)}.use_checkpoint", True, force_add=True)
    precision = OmegaConf.select(config, "lightning.trainer.precision")
    return measure(
        config,
        batches_of(config, settings.get("batch_size"), settings.get("reg", True)),
        base_precision=settings["base_precision"],
        precision=str(precision if precision is not None else "32"),
        cache=settings["cache"],
    )


def batches_of(
    config: DictConfig, batch_size: int | None = None, with_class: bool = True
) -> list[tuple[int, int, int]]:
    """(pictures, height, width) of the batches of a step. Raises `InputError` if the config does not say them."""
    params = config.data.get("params") or {}
    sets = [params.get("train"), *([params.get("reg")] if with_class else [])]
    sets = [one[0] if OmegaConf.is_list(one) else one for one in sets if one is not None]
    sizes = [OmegaConf.select(one, "params.size") for one in sets]
    count = batch_size or params.get("batch_size")
    if not sizes or not all(isinstance(size, int) for size in sizes) or not isinstance(count, int):
        raise InputError("the size of a step is unknown: set data.params.batch_size and data.params.train.params.size")
    return [(count, size, size) for size in sizes]


def in_words(found: Footprint) -> list[str]:
    """The parts of a footprint, one per line."""
    rows = {
        "frozen weights of the UNet": found.unet,
        "encoders on the device": found.encoders,
        "trainable weights": found.trainable,
        "their gradients": found.gradients,
        "state of the optimizer": found.optimizer,
        "activations": found.activations,
    }
    lines = [f"{found.parameters:,} trainable weights"]
    lines += [f"{name:28} {size / GIB:8.2f} GiB" for name, size in rows.items() if size]
    lines.append(f"{'peak of a step':28} {found.peak / GIB:8.2f} GiB, and about {OVERHEAD} for the driver on a GPU")
    lines.append(f"{'operations of a step':28} {found.flops / 1e12:8.2f} TFLOP")
    return lines


def _length(config: DictConfig, found: Footprint, name: str | None) -> list[str]:
    if name is None:
        return []
    floor, usual = seconds(found.calls, gpu(name)), seconds(found.calls, gpu(name), REACHED)
    line = f"{'a step on ' + name:28} {usual:8.2f} s at {REACHED:.0%} of its rates; roofline: {floor:.2f} s"
    steps = OmegaConf.select(config, "lightning.trainer.max_steps")
    whole = [f"{'the training':28} {steps * usual / 60:8.1f} min for {steps} steps"] if (steps or -1) > 0 else []
    return [line, *whole]


def fitting(config: DictConfig, settings: dict[str, Any], found: Footprint, limit: float) -> list[str]:
    """Lines that say whether a step fits into `limit` GiB; if not, the switches that help, until it fits."""
    needed = found.peak / GIB + OVERHEAD
    if needed <= limit:
        return [f"fits into {limit:g} GiB, with {limit - needed:.1f} GiB to spare"]
    lines, settings = [f"does not fit into {limit:g} GiB: it needs {needed:.1f}. What helps:"], dict(settings)
    batch = config.data.params.get("batch_size")
    for words, change in SWITCHES:
        words = words.format(unet=unet_params(config))
        if all(settings.get(key) == value for key, value in change.items()) or change == {"batch_size": batch}:
            continue
        settings |= change
        peak = footprint(config, settings).peak / GIB + OVERHEAD
        if peak >= needed - 0.005:
            continue  # the switch is on already, or has no effect here
        lines.append(f"  {words:55} {peak:6.1f} GiB")
        needed = peak
        if peak <= limit:
            return [*lines, "with these it fits"]
    return [*lines, "even so it does not fit: take smaller pictures (data.params.*.params.size) or another base"]
