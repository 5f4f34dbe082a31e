"""Make a LoRA from the difference of two models, e.g. a fully fine-tuned one and its base.

    ldm distill tuned.ckpt base.ckpt --rank 4 --clamp_quantile 0.99 --save_path svd_distill.safetensors
    ldm distill tuned.ckpt base.ckpt --rank 64 --sv_fro 0.95 --layers all --format kohya --save_path tuned.safetensors

Attention, feed-forward gates and residual blocks of the UNet, attention of the text encoder; --layers all takes every
linear layer and convolution that differs. The weights are mapped into memory and compared layer by layer.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from ldm.cli import Parser, add_ema, add_files, in_order, underscores
from ldm.commands.resize import add_cut, cut_of
from ldm.errors import InputError
from ldm.interchange.formats import written
from ldm.models.bases import DEFAULT

log = logging.getLogger(__name__)

MODELS = ("target_model", "base_model")


def add_arguments(p: Parser) -> None:
    p.respell = underscores
    p.add_argument("models", nargs="*", metavar="TARGET_MODEL BASE_MODEL", help="checkpoints or diffusers folders")
    for name in MODELS:
        p.add_argument(f"--{name}", help=argparse.SUPPRESS)
    add_ema(p, "TARGET_MODEL")
    add_ema(p, "BASE_MODEL", "--base_ema")
    add_cut(p)
    p.set_defaults(rank=4)
    p.add_argument("--layers", choices=("published", "all"), default="published", help="(default published)")
    p.add_argument("--clamp_quantile", type=float,
                   help="quantile of absolute values at which entries are cut (default 0.99; 1, none, of all layers)")
    p.add_argument("--signed_quantile", action="store_true",
                   help="the published rule: that of the signed values, which depends on the SVD's signs")  # fmt: skip
    p.add_argument("--device", help="cuda, mps or cpu; by default the best there is")
    p.add_argument("--save_path", default="svd_distill.safetensors", help="(default svd_distill.safetensors)")
    p.add_argument("--format", choices=written("lora"), default="cloneofsimo",
                   help="(default cloneofsimo)")  # fmt: skip
    add_files(p, DEFAULT.config)


def run(options: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ldm.devices import best_device
    from ldm.interchange import packed
    from ldm.interchange.base_choice import Choice
    from ldm.interchange.command import config_for, read_model, skeleton, to_be_written, write_lora
    from ldm.interchange.lora import Lora

    paths = in_order(options.models, {name: getattr(options, name) for name in MODELS}, " ".join(MODELS))
    whole = options.layers == "all"
    quantile = (1.0 if whole else 0.99) if options.clamp_quantile is None else options.clamp_quantile
    cut = cut_of(options)
    if not 0 < quantile <= 1:
        raise InputError(f"expected 0 < --clamp_quantile <= 1, got {quantile}")
    output, device = to_be_written(options.save_path, options.force, options.format), best_device(options.device)
    choices = (Choice(ema=options.ema), Choice(ema=options.base_ema))
    tuned, base = (packed.split(read_model(*pair)) for pair in zip(paths, (None, None), choices, strict=True))
    model, found = skeleton(config_for(options.config, *paths)), {}
    for name in tqdm(names_of(model, whole, in_both(model, tuned, base)), desc="layers"):
        pair = pair_of(name, tuned, base)
        if whole and pair[0].equal(pair[1]):
            continue
        factors = extracted(*(one.to(device) for one in pair), cut, quantile, options.signed_quantile)
        found[name] = factors._replace(down=factors.down.cpu(), up=factors.up.cpu())
    if not found:
        raise InputError(f"{paths[0]} and {paths[1]} have the same layers: there is nothing to extract")
    lora = Lora(found)
    write_lora(output, lora, model, options.format)
    print(f"{output}  {len(found)} layers, {told(lora.ranks())}")


def in_both(model, tuned, base) -> list[str]:
    """The parts that both files hold; a line tells of those that neither has."""
    from ldm.interchange import layers

    found = []
    for part, (prefix, _) in layers.parts(model).items():
        if any(name.startswith(prefix) for weights in (tuned, base) for name in weights):
            found.append(part)
        else:
            log.info("neither file has the %s: it is not compared", part.replace("_", " "))
    return found


def names_of(model, whole: bool, parts: Sequence[str]) -> list[str]:
    """The layers to compare."""
    from ldm.interchange import cloneofsimo, layers

    published = {"unet": cloneofsimo.CLASSES["unet"][1], **dict.fromkeys(layers.TEXT_PARTS, ["CLIPAttention"])}
    return [
        name for part, classes in published.items() if part in parts
        for name in layers.layers_of(model, part, None if whole else classes)
    ]  # fmt: skip


def pair_of(name: str, tuned, base):
    """The weights of a layer in both models. Raises `InputError` if they lack it or its shapes differ."""
    if not (f"{name}.weight" in tuned and f"{name}.weight" in base):
        raise InputError(f"{name}.weight is not in both models; are they of the family that --config names?")
    pair = tuned[f"{name}.weight"], base[f"{name}.weight"]
    if pair[0].shape != pair[1].shape:
        raise InputError(f"{name} has shape {list(pair[0].shape)} and {list(pair[1].shape)}: not one model's tuning")
    return pair


def extracted(tuned, base, cut, quantile: float, signed: bool):
    """The factors of a difference, cut at a quantile of their entries."""
    from ldm.interchange import lora, resize

    if signed:  # the published rule, with the signs that a whole SVD chooses
        return lora.distilled(tuned, base, cut.rank, quantile, signed)
    difference = tuned.float() - base.float()
    most = max(cut.rank, cut.conv_rank or 0)
    parts = resize.leading(difference, most)
    factors = resize.cut(parts, cut.of(parts.s, difference[0, 0].numel()), difference.shape)
    return factors if quantile == 1 else lora.clamped(factors, quantile)


def told(ranks: list[int]) -> str:
    """One rank, or the lowest and the highest."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
