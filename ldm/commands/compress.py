"""Compress a Custom Diffusion delta: low-rank changes of keys and values, not whole weights.

    ldm compress --delta_ckpt logs/<run>/checkpoints/delta_epoch=000004.ckpt --ckpt models/sd-v1-4.ckpt

writes compressed_delta_... beside the delta.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import Parser
from ldm.errors import InputError


def add_arguments(p: Parser) -> None:
    p.add_argument("--delta_ckpt", required=True, help="the delta, in LDM's or in diffusers' layout")
    p.add_argument("--ckpt", required=True, help="the pretrained model: a checkpoint or a diffusers folder")
    p.add_argument("--diffuser", action="store_true", help="write diffusers' layout (default: that of the input)")
    p.add_argument(
        "--compression_ratio", type=float, default=0.6, help="share of the sum of singular values (default 0.6)"
    )
    p.add_argument("--force", action="store_true", help="overwrite what exists")


def run(options: argparse.Namespace) -> None:
    from ldm.interchange import Context, by_name, custom_diffusion, open_file, recognise
    from ldm.interchange.command import read_model, to_be_written

    source = Path(options.delta_ckpt)
    if "delta" not in source.name:
        raise InputError(
            f"{source.name}: the output is called as the input with compressed_delta for delta; rename it so"
        )
    output = to_be_written(source.with_name(source.name.replace("delta", "compressed_delta")), options.force)
    row = recognise(file := open_file(source))
    if row.form != "delta":
        raise InputError(f"{source} is no Custom Diffusion delta but of the kind {row.name}")
    delta = row.read("delta", file)
    packed = custom_diffusion.compress(delta, read_model(options.ckpt), options.compression_ratio, str(source))
    # the format of diffusers' own script holds whole weights only
    is_ldm = row.name == "delta" and not options.diffuser
    by_name("delta" if is_ldm else "delta-diffusers").write(output, packed, Context())
    before, after = (path.stat().st_size / 2**20 for path in (source, output))
    print(f"{output}  {before:.2f} MB -> {after:.2f} MB")
