"""Make a LoRA from the difference of two models, e.g. a fully fine-tuned one and its base.

    ldm distill tuned.ckpt base.ckpt --rank 4 --clamp_quantile 0.99 --save_path svd_distill.safetensors

Attention, feed-forward gates and residual blocks of the UNet, attention of the text encoder.
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser, add_files, in_order, underscores
from ldm.errors import InputError
from ldm.interchange.formats import written
from ldm.models.bases import DEFAULT

MODELS = ("target_model", "base_model")


def add_arguments(p: Parser) -> None:
    p.respell = underscores
    p.add_argument("models", nargs="*", metavar="TARGET_MODEL BASE_MODEL", help="checkpoints or diffusers folders")
    for name in MODELS:
        p.add_argument(f"--{name}", help=argparse.SUPPRESS)
    p.add_argument("--rank", type=int, default=4, help="(default 4)")
    p.add_argument("--clamp_quantile", type=float, default=0.99,
                   help="quantile of absolute values at which entries are cut (default 0.99; 1: none)")  # fmt: skip
    p.add_argument("--signed_quantile", action="store_true",
                   help="the published rule: that of the signed values, which depends on the SVD's signs")  # fmt: skip
    p.add_argument("--device", help="cuda, mps or cpu; by default the best there is")
    p.add_argument("--save_path", default="svd_distill.safetensors", help="(default svd_distill.safetensors)")
    p.add_argument("--format", choices=written("lora"), default="cloneofsimo",
                   help="(default cloneofsimo)")  # fmt: skip
    add_files(p, DEFAULT.config)


def run(options: argparse.Namespace) -> None:
    from ldm.devices import best_device
    from ldm.interchange import cloneofsimo, layers
    from ldm.interchange.command import config_for, read_model, skeleton, to_be_written, write_lora
    from ldm.interchange.lora import Lora, distilled

    paths = in_order(options.models, {name: getattr(options, name) for name in MODELS}, " ".join(MODELS))
    if options.rank < 1 or not 0 < options.clamp_quantile <= 1:
        raise InputError(
            f"expected --rank >= 1 and 0 < --clamp_quantile <= 1, got {options.rank}, {options.clamp_quantile}"
        )
    output, device = to_be_written(options.save_path, options.force, options.format), best_device(options.device)
    tuned, base = (read_model(path) for path in paths)
    model = skeleton(config_for(options.config, *paths))
    names = [
        name
        for part, classes in (("unet", cloneofsimo.CLASSES["unet"][1]), ("text_encoder", ["CLIPAttention"]))
        for name in layers.layers_of(model, part, classes)
    ]
    from tqdm import tqdm

    found = {}
    for name in tqdm(names, desc="layers"):
        if not (f"{name}.weight" in tuned and f"{name}.weight" in base):
            raise InputError(f"{name}.weight is not in both models; are they of the family that --config names?")
        pair = tuned[f"{name}.weight"], base[f"{name}.weight"]
        if pair[0].shape != pair[1].shape:
            raise InputError(
                f"{name} has shape {list(pair[0].shape)} and {list(pair[1].shape)}: not one model's tuning"
            )
        factors = distilled(
            *(one.to(device) for one in pair), options.rank, options.clamp_quantile, options.signed_quantile
        )
        found[name] = factors._replace(down=factors.down.cpu(), up=factors.up.cpu())
    write_lora(output, Lora(found), model, options.format)
    print(f"{output}  {len(found)} layers, rank {options.rank}")
