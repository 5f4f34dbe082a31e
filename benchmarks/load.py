"""How long it takes to have a Stable Diffusion v1 model in memory, against reading its file and against the plain way.

    python benchmarks/load.py [--folder /tmp]

Writes a full-size checkpoint of random weights (4.3 GB) as .ckpt and .safetensors into a temporary folder first.
"Touched" sums every weight too, so that a memory-mapped file has really been read.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import parser, table, timed

from ldm.checkpoints import read_weights, save_safetensors, save_torch
from ldm.config import find_file, instantiate_from_config, load_config
from ldm.models.building import skip_init
from ldm.util import load_model_from_config

CONFIG = "configs/stable-diffusion/v1-inference.yaml"


def random_checkpoint(folder: Path) -> tuple[Path, Path]:
    """Full-size weights in both formats."""
    with skip_init():
        model = instantiate_from_config(load_config(find_file(CONFIG)).model)
    weights = model.state_dict()
    for value in weights.values():
        if value.is_floating_point():
            value.uniform_(-0.05, 0.05)
    save_torch(folder / "model.ckpt", {"state_dict": weights})
    save_safetensors(folder / "model.safetensors", weights)
    return folder / "model.ckpt", folder / "model.safetensors"


def read(path: Path, touch: bool = False) -> None:
    """Read a file into memory."""
    memory = torch.empty(path.stat().st_size, dtype=torch.uint8).numpy()
    with path.open("rb", buffering=0) as file:
        view, done = memoryview(memory), 0
        while read := file.readinto(view[done : done + (1 << 26)]):
            done += read
    if touch:
        torch.from_numpy(memory[: memory.size // 4 * 4]).view(torch.float32).sum()


def load(path: Path, touch: bool) -> None:
    model = load_model_from_config(load_config(find_file(CONFIG)), path)
    if touch:
        with torch.no_grad():
            sum(float(p.sum()) for p in model.parameters())


def plain_way(path: Path) -> None:
    """Initialise everything at random, read everything, copy everything."""
    model = instantiate_from_config(load_config(find_file(CONFIG)).model)
    model.load_state_dict({k: v.clone() for k, v in read_weights(path).items()}, strict=False)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--folder", help="where to write the checkpoints; by default the temporary folder")
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ckpt, safetensors = random_checkpoint(Path(folder))
        works = {
            "read the file": lambda: read(ckpt),
            "read the file, touched": lambda: read(ckpt, touch=True),
            "build and load .ckpt": lambda: load(ckpt, touch=False),
            "build and load .ckpt, touched": lambda: load(ckpt, touch=True),
            "build and load .safetensors": lambda: load(safetensors, touch=False),
            "build and load .safetensors, touched": lambda: load(safetensors, touch=True),
            "initialise, read, copy": lambda: plain_way(ckpt),
        }
        rows = {name: timed(work, options.repeats) for name, work in works.items()}
    table(rows, peer="read the file", as_json=options.json)


if __name__ == "__main__":
    main()
