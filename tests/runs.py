"""What the tests of whole runs share: pictures made on the fly, both programs called here or as a command."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT
from tests.forkserver import ForkServer, Process

TINY = ROOT / "tests" / "configs" / "tiny.yaml"
# One thread: tests run beside each other, and sums in another order would not be the same bit for bit.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}

SERVER = ForkServer(ENVIRONMENT)


def pictures(folder: Path, number: int, seed: int = 0) -> Path:
    """A folder with `number` pictures of colourful noise, 40 x 36 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for i in range(number):
        coarse = torch.randint(0, 256, (5, 4, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(coarse.numpy()).resize((40, 36)).save(folder / f"{i}.png")
    return folder


def arguments(work: Path, *more: str, config: Path = TINY) -> list[str]:
    """A command line that trains on four photographs and three class pictures under `work`, made if absent."""
    photos, reg = work / "photos", work / "class"
    if not photos.exists():
        pictures(photos, 4), pictures(reg, 3, seed=1)
    roots = ["--data_root", photos, "--reg_data_root", reg, "--logdir", work / "logs", "--class_word", "dog"]
    return [str(word) for word in ["--base", config, "-t", *roots, *more]]


def train(work: Path, name: str, *more: str, config: Path = TINY) -> Path:
    """Train in this process; the folder of the run."""
    main_dream_booth(*arguments(work, "-n", name, "--accelerator", "cpu", *more, config=config))
    return find_run(work, name)


def resume(run: Path, *more: str) -> None:
    """Go on with a run in this process."""
    main_dream_booth("-t", "-r", str(run), *more)


def main_dream_booth(*words: str) -> None:
    from main_dream_booth import main

    main([str(word) for word in words])


def find_run(work: Path, name: str) -> Path:
    """The one run of that name."""
    (run,) = (work / "logs").glob(f"*_{name}")
    return run


def sample(outdir: Path, *more: str, config: Path = TINY) -> list[Path]:
    """Sample on the CPU in this process; the single pictures in the order in which they were made."""
    from sample import main

    main([str(word) for word in ["--config", config, "--device", "cpu", "--outdir", outdir, "--ddim_steps", 2, *more]])
    return sorted((outdir / "samples").glob("*.png"))


def command(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a program of this repository; its exit code and what it wrote."""
    return SERVER.run([*map(str, words)], ENVIRONMENT | environment)


def fresh_command(*words: str) -> subprocess.CompletedProcess:
    """The same in a new interpreter."""
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )


def start(*words: str) -> Process:
    """Start a program of this repository; both of its streams come through `stdout`, a line at a time."""
    return SERVER.start([*map(str, words)], ENVIRONMENT)


def last(run: Path) -> dict:
    """The whole content of a run's last.ckpt."""
    from ldm.checkpoints import read_object

    return read_object(run / "checkpoints" / "last.ckpt")


def differences(a, b, path: str = "") -> list[str]:
    """The places at which two nested values are not the same, bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys(), key=str)
        return [d for k in keys for d in differences(a.get(k, "absent"), b.get(k, "absent"), f"{path}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    return [] if type(a) is type(b) and a == b else [path]


def pixels(path: Path) -> torch.Tensor:
    """A picture as float [h, w, c] in 0 .. 255."""
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).float()


def tiny_model(*overrides: str) -> SimpleNamespace:
    """The model of the tiny config on its seeded random base."""
    from ldm.config import load_config
    from ldm.util import load_model_from_config

    return load_model_from_config(load_config(TINY, overrides))


def events(run: Path) -> EventAccumulator:
    """What a run wrote for TensorBoard."""
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
