"""Merge LoRAs in a weighted sum, or position adapters: scaled, summed, or stacked.

    ldm merge a.safetensors b.safetensors --weights 0.7 0.3 --rank 16 --out sum.safetensors
    ldm merge a.safetensors b.safetensors --block_weights OUTALL INALL --out sum.safetensors
    ldm merge a/500-adapters b/500-adapters --weights 0.7 0.3 --out both
    ldm merge a/500-adapters b/500-adapters --stack --out both

LoRAs of any format, and folders of ours that hold one, are summed exactly, so that their ranks add up; --rank and the
options of `ldm resize` keep the best of it. --block_weights scale the blocks of the UNet, one for each LoRA or one
for all: 17 numbers joined by commas (BASE, IN01, IN02, IN04, IN05, IN07, IN08, M00, OUT03 to OUT11), 26 for all
blocks, 12 or 20 for SDXL, or a preset: NONE, ALL, INS, IND, INALL, MIDD, OUTD, OUTS, OUTALL, ALL0.5.

A sum of position adapters is exact and one adapter for each route, whose mid_dim is the sum of theirs; stacking needs
no equal routes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ldm.cli import Parser, add_files
from ldm.commands.resize import add_cut, cut_of
from ldm.errors import InputError
from ldm.interchange.formats import written
from ldm.models.bases import DEFAULT


def add_arguments(p: Parser) -> None:
    p.add_argument("folders", nargs="+", metavar="FILE", help="LoRAs or folders; of one, --weights scales it")
    p.add_argument("--weights", nargs="+", type=float, help="one for each (default 1)")
    p.add_argument("--stack", action="store_true", help="position adapters side by side instead of summed")
    p.add_argument("--out", required=True, metavar="OUTPUT")
    lora = p.add_argument_group("for LoRAs")
    lora.add_argument("--block_weights", nargs="+", metavar="NUMBERS", help="weights by block of the UNet, see above")
    add_cut(lora)
    lora.add_argument("--to", choices=written("lora"), metavar="FORMAT",
                      help=f"{', '.join(written('lora'))} (default: that of the first file, or kohya)")  # fmt: skip
    add_files(p, DEFAULT.config)


def run(options: argparse.Namespace) -> None:
    from ldm.interchange.command import to_be_written

    weights = options.weights or [1.0] * len(options.folders)
    if len(weights) != len(options.folders):
        raise InputError(f"{len(weights)} --weights for {len(options.folders)} files; expected one for each")
    cut = cut_of(options)
    if all(map(_holds_position_adapters, options.folders)):
        if cut or options.block_weights or options.to:
            raise InputError(f"{options.folders[0]} holds position adapters, which have no ranks or formats to choose")
        print(_position(options.folders, weights, to_be_written(options.out, options.force), options.stack))
    else:
        print(_loras(options.folders, weights, cut, options))


def _holds_position_adapters(path: str) -> bool:
    from ldm.modules.folders import read_config

    if not Path(path).is_dir() or (Path(path) / "adapter_model.safetensors").is_file():
        return False
    return bool((read_config(path) or {"adapters": ["unnamed ones"]})["adapters"])


def _position(folders: Sequence[str], weights: Sequence[float], output: Path, stack: bool) -> str:
    from ldm.interchange import position

    held = [position.read(path) for path in folders]
    if len(held) == 1:
        merged = position.scaled(held[0], weights[0])
    else:
        merged = (position.stacked if stack else position.summed)(held, weights)
    position.write(output, merged)
    parts = (f"{e['din']}-{e['dout']}, mid_dim {e['mid_dim']}, scale {e['scale']:g}" for e in merged[0]["adapters"])
    return f"{output}  {'; '.join(parts)}"


def _loras(paths: Sequence[str], weights: Sequence[float], cut, options: argparse.Namespace) -> str:
    from tqdm import tqdm

    from ldm.interchange import blocks, open_file, read_lora, recognise
    from ldm.interchange.command import config_for, skeleton, to_be_written, told_words, write_lora
    from ldm.interchange.lora import weighted_sum
    from ldm.interchange.resize import resized_lora

    if options.stack:
        raise InputError("--stack is for position adapters; a sum of LoRAs has their factors side by side as it is")
    own = options.block_weights or ["ALL"]
    if len(own) not in (1, len(paths)):
        raise InputError(f"{len(own)} --block_weights for {len(paths)} files; expected one for all or one for each")
    by_block = [blocks.parse(one) for one in (own * len(paths) if len(own) == 1 else own)]
    files = [open_file(path) for path in paths]
    kind = recognise(files[0]).name
    kind = options.to or (kind if kind in written("lora") else "kohya")
    output = to_be_written(options.out, options.force, kind)
    model = skeleton(config_for(options.config, *files))
    loras = [read_lora(file, model) for file in files]
    if options.block_weights:
        loras = [blocks.weighted(lora, own) for lora, own in zip(loras, by_block, strict=True)]
    merged = weighted_sum(loras, weights)
    kept = ""
    if cut:
        merged, shares = resized_lora(merged, cut, lambda layers: tqdm(layers, desc="layers"))
        kept = f", {sum(shares.values()) / max(1, len(shares)):.1%} of the norm kept"
    if not merged.layers:
        raise InputError(f"nothing is left of {', '.join(paths)}: every layer has the weight 0")
    write_lora(output, merged, model, kind)
    return f"{output}  {len(merged.layers)} layers, ranks {merged.ranks()}{kept}{told_words(kind, merged)}"
