"""Extract what Custom Diffusion trained from checkpoints, as small delta files beside them.

    ldm deltas --path logs/<run> --newtoken 1

writes checkpoints/delta_<name>.ckpt for each checkpoint of the run, as delta_epoch=000004.ckpt; last.ckpt counts only
where there is no other, as after a run of this code, and is named after its epoch. The checkpoints stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ldm.cli import Parser, add_ema
from ldm.errors import InputError


def add_arguments(p: Parser) -> None:
    p.add_argument("--path", required=True, help="a run's folder, a folder of checkpoints, or one checkpoint")
    p.add_argument("--newtoken", type=int, default=1, help="how many new words were trained (default 1)")
    p.add_argument(
        "--freeze_model",
        choices=("crossattn-kv", "crossattn"),
        default="crossattn-kv",
        help="what was trained; crossattn also saves queries and outputs, which the published program loses",
    )
    add_ema(p, "a checkpoint")
    p.add_argument("--force", action="store_true", help="overwrite what exists")


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints that a path means. Raises `InputError` if there are none."""
    if path.is_file():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [f for f in sorted(folder.glob("*.ckpt")) if "delta" not in f.name]
    if not found:
        raise InputError(f"{folder} holds no checkpoints but deltas; name a run's folder or one checkpoint")
    return [f for f in found if f.name != "last.ckpt"] or found


def name_of(file: Path, content: Any) -> str:
    """The name of a checkpoint's delta. Published runs name their checkpoints after epochs."""
    epoch = content.get("epoch") if file.name == "last.ckpt" and isinstance(content, dict) else None
    return f"delta_epoch={epoch:06d}.ckpt" if isinstance(epoch, int) else f"delta_{file.stem}.ckpt"


def run(options: argparse.Namespace) -> None:
    from ldm.checkpoints import read_object, weights_in
    from ldm.interchange import custom_diffusion
    from ldm.interchange.base_choice import Choice
    from ldm.interchange.command import to_be_written

    files = checkpoints(Path(options.path))
    contents = [read_object(file) for file in files]  # memory-mapped
    names = [name_of(file, content) for file, content in zip(files, contents, strict=True)]
    outputs = [to_be_written(file.with_name(name), options.force) for file, name in zip(files, names, strict=True)]
    for number, (file, content, output) in enumerate(zip(files, contents, outputs, strict=True), 1):
        weights = Choice(ema=options.ema).averaged(weights_in(content, file), str(file))
        delta = custom_diffusion.extract(weights, options.newtoken, options.freeze_model, str(file))
        custom_diffusion.write(output, delta)
        print(f"[{number}/{len(files)}] {output}  {len(delta.weights)} weights, {len(delta.tokens)} new words")
