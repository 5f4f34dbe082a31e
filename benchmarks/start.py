"""From the command to the first training step of Stable Diffusion v1, against reading its checkpoint.

    python benchmarks/start.py [--folder /tmp]

Writes a full-size checkpoint of random weights (4.3 GB) first. "From disk": the file is not in the page cache. The
clock stops where the first step would begin; encoding the pictures, which depends on their number, is off.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytorch_lightning as pl
import torch
from common import parser, table, timed
from load import random_checkpoint, read
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs/sd-inject-dreambooth/attn2o-ffni.yaml"


class StopAtTheFirstStep(pl.Callback):
    def on_train_batch_start(self, *_) -> None:
        os._exit(0)


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def command(path: Path, folder: Path) -> None:
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(photos / "0.png")
    words = [
        sys.executable, ROOT / "main_dream_booth.py", "--base", CONFIG, "-t", "--actual_resume", path,
        "--logdir", folder, "--data_root", photos, "--class_word", "dog", "--reg_data_root", photos,
        "--accelerator", "cpu", "--cache", "off",
        "lightning.callbacks.stop.target=start.StopAtTheFirstStep",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    # A pipe would wait for the workers that read pictures, which outlive their parent by seconds.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([str(word) for word in words], env=environment, check=True, **quiet)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--folder", help="where to write the checkpoint; by default the temporary folder")
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        path, _ = random_checkpoint(folder)
        works = {"read the file": lambda: read(path), "command to first step": lambda: command(path, folder)}
        rows = {
            f"{name}, from disk": timed(work, options.repeats, before=lambda: forget(path))
            for name, work in works.items()
        } | {name: timed(work, options.repeats) for name, work in works.items()}
    table(rows, peer="read the file, from disk", as_json=options.json)


if __name__ == "__main__":
    main()
