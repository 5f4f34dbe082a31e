"""Compare guidance scales of checkpoints: CLIP-T against FID and KID, as a table and a figure.

    ldm guidance models/sd-v1-4.ckpt models/sd-v1-5.ckpt --captions coco/val.txt --against coco/val2017 --number 10000
    ldm guidance models/sd-mini/model.safetensors --captions photos --out outputs/guidance

writes <out>/guidance.csv, a row for each checkpoint and scale, and <out>/guidance.png. Without --against, the pictures
of the captioned folder are what FID and KID compare with. By default eight scales by 50 steps of PLMS, as published.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldm.cli import Parser, add_allow_family, count, seed_number
from ldm.errors import InputError


def add_arguments(p: Parser) -> None:
    p.add_argument("ckpt", nargs="+", help="checkpoints of base models, or diffusers folders")
    p.add_argument("--captions", required=True, metavar="FILE|DIR", help="a caption per line, or captioned pictures")
    p.add_argument("--against", metavar="DIR", help="real pictures (default: those of --captions, if it is a folder)")
    p.add_argument("--number", type=count, metavar="N", help="so many captions, chosen at random (default: all)")
    p.add_argument("--scales", type=float, nargs="+", default=[1.5, 2, 3, 4, 5, 6, 7, 8], help="(default 1.5 2 ... 8)")
    p.add_argument("--config", default="auto", help="of all checkpoints (default auto: by what each is)")
    p.add_argument("--adapter_path", action="append", default=[], metavar="PATH", help="what was tuned; repeatable")
    add_allow_family(p)
    p.add_argument("--sampler", choices=("ddim", "plms", "dpm_solver"), default="plms", help="(default plms)")
    p.add_argument("--ddim_steps", type=count, default=50, help="steps of any sampler (default 50)")
    p.add_argument("--seed", type=seed_number, default=0, help="of the first picture; they count up (default 0)")
    p.add_argument("--batch_size", type=count, default=16, help="pictures at once (default 16)")
    p.add_argument("--network", action="append", metavar="NAME",
                   help="in whose eyes, the first of them a CLIP (default: those of the base); repeatable")  # fmt: skip
    p.add_argument("--download", action="store_true", help="fetch networks that are not in the hub's cache")
    p.add_argument("--cache", default="logs/features", metavar="DIR|off", help="of vectors (default logs/features)")
    p.add_argument("--pictures", type=Path, metavar="DIR", help="keep the pictures that are drawn")
    p.add_argument("--device", help="cuda, cuda:1, mps or cpu; by default the best there is")
    p.add_argument("--out", type=Path, default=Path("outputs/guidance"), help="(default %(default)s)")


def run(options: argparse.Namespace) -> None:
    from ldm.evaluate import guidance
    from ldm.evaluate.features import FeatureCache

    prompts, references = asked(options)
    cache = FeatureCache(None if options.cache == "off" else options.cache)
    rows: list[dict[str, Any]] = []
    stems = [Path(ckpt).stem for ckpt in options.ckpt]
    for ckpt, stem in zip(options.ckpt, stems, strict=True):
        name = stem if stems.count(stem) == 1 else ckpt
        model, networks, protocol = prepared(ckpt, options)
        keep = options.pictures and options.pictures / name.strip("/").replace("/", "_")
        for row in guidance.measured(
            model, prompts, references, options.scales, networks, protocol, cache, keep, verbose=True
        ):
            rows.append({"checkpoint": name, **row})
            guidance.save(options.out / "guidance.csv", rows)
            values = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float))
            print(f"{ckpt}: {values}", flush=True)
    labels = list(networks)
    guidance.figure(options.out / "guidance.png", rows, labels[0], labels[-1])
    print(f"{options.out / 'guidance.csv'}  {options.out / 'guidance.png'}")


def asked(options: argparse.Namespace) -> tuple[list[str], Any]:
    """The prompts and the real pictures. Raises `InputError`, also if the figure could not be drawn in the end."""
    from ldm.data.pictures import find_pictures
    from ldm.evaluate import guidance
    from ldm.evaluate.features import Files

    if find_spec("matplotlib") is None:
        raise InputError("the figure needs matplotlib: pip install 'position-adapters-ldm[study]'")
    prompts = guidance.read_prompts(options.captions, options.number, options.seed)
    if not options.against and not Path(options.captions).is_dir():
        raise InputError(f"--against is missing: {options.captions} has captions alone; name a folder of real pictures")
    references = Files(find_pictures(options.against or options.captions, (".txt", ".caption", ".jsonl", ".csv")))
    if len(references) < guidance.LEAST:
        raise InputError(f"{options.against or options.captions} has {len(references)} pictures; FID and KID need "
                         f"at least {guidance.LEAST}")  # fmt: skip
    return prompts, references


def prepared(ckpt: str, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """A model with what was tuned, the networks that see its pictures, and the protocol. Raises `InputError`."""
    from ldm.commands.sample import config_of
    from ldm.config import find_file, load_config
    from ldm.devices import best_device
    from ldm.evaluate.protocol import Protocol
    from ldm.evaluate.scoring import load_networks
    from ldm.interchange import load_any
    from ldm.models.building import untuned
    from ldm.util import load_model_from_config

    config = config_of(ckpt) if options.config == "auto" else options.config
    model = load_model_from_config(untuned(load_config(find_file(config))), ckpt)
    for path in options.adapter_path:
        load_any(model, path)
    model = model.to(best_device(options.device)).eval()
    protocol = Protocol(
        sampler=options.sampler, steps=options.ddim_steps, seed=options.seed, batch_size=options.batch_size,
        networks=options.network and tuple(options.network), download=options.download,
    )  # fmt: skip
    networks = load_networks(protocol, model)
    if next(iter(networks.values())).embed_captions is None:
        raise InputError(f"--network {protocol.networks[0]} reads no text; name a CLIP first")
    return model, networks, protocol
