"""From the command to the first step of sampling and of training, against the least that it needs.

    python benchmarks/start.py [--folder /tmp]

The least is a new Python that imports torch (for training: Lightning, too) and reads the weights. Small: SD-mini, 15
MB. Large: Stable Diffusion v1, 4.3 GB of random weights, written first, and in the page cache when they are read. The
clock stops where the UNet is called for the first time. Pictures are not encoded, since that depends on their number.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import parser, table, timed
from load import random_checkpoint
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / "models/sd-mini/model.safetensors"
READ = """
import sys, torch
if sys.argv[2] == "train":
    import pytorch_lightning
memory = torch.empty(__import__("os").stat(sys.argv[1]).st_size, dtype=torch.uint8).numpy()
with open(sys.argv[1], "rb", buffering=0) as file:
    view, done = memoryview(memory), 0
    while read := file.readinto(view[done : done + (1 << 26)]):
        done += read
"""
# A verb, in a process that ends where the UNet is called for the first time.
UNTIL = """
import os, sys, torch
def stop(module, inputs):
    if type(module).__name__ == "UNetModel":
        os._exit(0)
torch.nn.modules.module.register_module_forward_pre_hook(stop)
from ldm.__main__ import main
sys.exit(main() or 1)
"""


def python(program: str, *words: object) -> None:
    """Run a program in a new Python. Raises where it fails, and where it never comes to the UNet."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # A pipe would wait for the workers that read pictures, which outlive their parent by seconds.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([sys.executable, "-c", program, *map(str, words)], env=environment, check=True, **quiet)


def sample(config: str, path: Path, folder: Path) -> None:
    python(UNTIL, "sample", "--config", ROOT / config, "--ckpt", path, "--outdir", folder / "samples",
           "--prompt", "an emoji of a dog", "--device", "cpu")  # fmt: skip


def train(config: str, path: Path, folder: Path) -> None:
    photos = folder / "photos"
    photos.mkdir(exist_ok=True)
    Image.new("RGB", (64, 64)).save(photos / "0.png")
    python(UNTIL, "train", "--base", ROOT / config, "-t", "--actual_resume", path, "--logdir", folder / "logs",
           "--data_root", photos, "--class_word", "dog", "--reg_data_root", photos, "--accelerator", "cpu",
           "--cache", "off", "lightning.callbacks.image_logger=null")  # fmt: skip


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--folder", help="where to write the checkpoint; by default the temporary folder")
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        large, _ = random_checkpoint(folder)
        cases = {
            ("sample", "small"): (sample, "configs/sd-mini/inference.yaml", MINI),
            ("sample", "large"): (sample, "configs/stable-diffusion/v1-inference.yaml", large),
            ("train", "small"): (train, "configs/sd-mini/attn2o-ffni.yaml", MINI),
            ("train", "large"): (train, "configs/sd-inject-dreambooth/attn2o-ffni.yaml", large),
        }
        for (verb, size), (command, config, path) in cases.items():
            least = f"{'import Lightning' if verb == 'train' else 'import torch'} and read {size}"
            rows = {
                least: timed(partial(python, READ, path, verb), options.repeats),
                f"ldm {verb} to the first step, {size}": timed(partial(command, config, path, folder), options.repeats),
            }
            table(rows, peer=least, as_json=options.json)


if __name__ == "__main__":
    main()
