"""Extract what Custom Diffusion trained from checkpoints, as small delta files beside them.

    ldm deltas --path logs/<run> --newtoken 1

writes checkpoints/delta_<name>.ckpt for each checkpoint of the run; last.ckpt counts only where there is no other, as
after a run of this code. The checkpoints stay.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldm.cli import Parser
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


def run(options: argparse.Namespace) -> None:
    from ldm.checkpoints import read_weights
    from ldm.interchange import custom_diffusion
    from ldm.interchange.command import to_be_written

    files = checkpoints(Path(options.path))
    outputs = [to_be_written(f.with_name(f"delta_{f.stem}.ckpt"), options.force) for f in files]
    for number, (file, output) in enumerate(zip(files, outputs, strict=True), 1):
        delta = custom_diffusion.extract(read_weights(file), options.newtoken, options.freeze_model, str(file))
        custom_diffusion.write(output, delta)
        print(f"[{number}/{len(files)}] {output}  {len(delta.weights)} weights, {len(delta.tokens)} new words")
