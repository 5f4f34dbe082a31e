"""Custom Diffusion: the small part of checkpoints that was trained, as delta files beside them.

    python scripts/get_deltas.py --path logs/<run> --newtoken 1

writes checkpoints/delta_<name>.ckpt for each checkpoint of the run; last.ckpt counts only where there is no other, as
after a run of this code. The checkpoints stay.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout as well

from ldm.cli import (
    Parser,  # noqa: E402
    run_command,  # noqa: E402
)
from ldm.errors import InputError  # noqa: E402


def parser() -> Parser:
    p = Parser(description=__doc__)
    p.add_argument("--path", required=True, help="a run's folder, a folder of checkpoints, or one checkpoint")
    p.add_argument("--newtoken", type=int, default=1, help="how many new words were trained (default 1)")
    p.add_argument(
        "--freeze_model",
        choices=("crossattn-kv", "crossattn"),
        default="crossattn-kv",
        help="what was trained; crossattn also saves queries and outputs, which the published program loses",
    )
    p.add_argument("--force", action="store_true", help="overwrite what exists")
    return p


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints that a path means. Raises `InputError` if there are none."""
    if path.is_file():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [f for f in sorted(folder.glob("*.ckpt")) if "delta" not in f.name]
    if not found:
        raise InputError(f"{folder} holds no checkpoints but deltas; name a run's folder or one checkpoint")
    return [f for f in found if f.name != "last.ckpt"] or found


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)

    from ldm.checkpoints import read_weights
    from ldm.interchange import custom_diffusion
    from ldm.interchange.command import to_be_written

    files = checkpoints(Path(options.path))
    outputs = [to_be_written(f.with_name(f"delta_{f.stem}.ckpt"), options.force) for f in files]
    for number, (file, output) in enumerate(zip(files, outputs, strict=True), 1):
        delta = custom_diffusion.extract(read_weights(file), options.newtoken, options.freeze_model, str(file))
        custom_diffusion.write(output, delta)
        print(f"[{number}/{len(files)}] {output}  {len(delta.weights)} weights, {len(delta.tokens)} new words")


if __name__ == "__main__":
    run_command(main)
