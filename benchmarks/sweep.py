"""Seconds per trial: a shell loop over the published programs, side by side, `ldm sweep`, and diffusers with peft.

    python benchmarks/sweep.py                  # SD-mini, 200 steps, 16 pictures; about 15 minutes on two cores

A trial is a training on one subject and 16 pictures of it. The shell loop scores nothing; the sweep does. The peer
trains a LoRA of rank 4 on a UNet of diffusers that has SD-mini's widths (random weights; latents and captions are
given, so that no encoder works), a process of one thread for each core.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import parser, table

ROOT = Path(__file__).resolve().parent.parent
SUBJECT = ROOT / "examples/subjects/noto_cat"
CONFIG = "configs/sd-mini/attn2o-ffni.yaml"


def command(words: list, threads: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stderr[-2000:]}")


def training(work: Path, steps: int, seeds: list[int]) -> list:
    return ["--data_root", SUBJECT, "--reg_data_root", work / "class", "--class_word", "cat", "--max_steps", steps,
            "-l", work / "logs", "--seed", *seeds, "lightning.callbacks.image_logger.params.disabled=true"]  # fmt: skip


def shell_loop(work: Path, steps: int, seed: int, threads: int) -> float:
    """Seconds of one trial by the published programs."""
    start, name = time.perf_counter(), f"loop-{seed}"
    command(["main_dream_booth.py", "--base", CONFIG, "-t", "--no-test", "-n", name,
             *training(work, steps, [seed])], threads)  # fmt: skip
    (folder,) = (work / "logs").glob(f"*_{name}/checkpoints/{steps}-adapters")
    command(["sample.py", "--config", "configs/sd-mini/inference.yaml", "--prompt", "an emoji of a sks cat", "--H", 64,
             "--W", 64, "--f", 4, "--n_samples", 16, "--ddim_steps", 25, "--adapter_path", folder,
             "--outdir", work / name], threads)  # fmt: skip
    return time.perf_counter() - start


def side_by_side(work: Path, steps: int, together: int, threads: int) -> float:
    """Seconds of each of several trainings by `ldm train-many`, without pictures."""
    start = time.perf_counter()
    subjects = ["--data_root", *[SUBJECT] * together]
    words = training(work, steps, [1])[2:]
    command(["-m", "ldm", "train-many", "--base", CONFIG, "-t", "-n", "many", *subjects, *words], threads)
    return (time.perf_counter() - start) / together


def by_sweep(work: Path, steps: int, together: int, workers: int) -> tuple[float, float, float]:
    """Seconds of each trial of `ldm sweep`, seconds until its workers began, and the share of its time that was not
    training or scoring from then on."""
    import pandas

    trials, out = together * workers, work / "sweep"
    start = time.time()
    command(["-m", "ldm", "sweep", "--base", CONFIG, f"seed={','.join(map(str, range(1, trials + 1)))}",
             f"subject={SUBJECT}", "--reg_data_root", work / "class", "--max_steps", steps, "--together", together,
             "--workers", workers, "--out", out], 1)  # fmt: skip
    seconds = time.time() - start
    rows = pandas.read_parquet(out / "results.parquet")
    assert rows.status.eq("done").all() and len(rows) == trials
    ends = pandas.to_datetime(rows.finished).map(lambda moment: moment.timestamp())
    began = min(ends[of.index].max() - of.seconds.sum() for _, of in rows.groupby("group")) - start
    return seconds / trials, began, 1 - rows.seconds.sum() / ((seconds - began) * workers)


def peer_unet() -> Any:
    """A UNet of diffusers of SD-mini's widths with a LoRA of rank 4."""
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 96, 128), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return unet


def peer_step(batch: int, unet: Any = None) -> Callable[[], None]:
    """A training step of the peer."""
    from diffusers import DDIMScheduler

    unet = peer_unet() if unet is None else unet
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)
    noises = DDIMScheduler(num_train_timesteps=1000)
    latents, text = torch.randn(batch, 4, 16, 16), torch.randn(batch, 32, 128)

    def step() -> None:
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (batch,))
        answer = unet(noises.add_noise(latents, noise, t), t, text).sample
        torch.nn.functional.mse_loss(answer, noise).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peer(steps: int) -> None:
    """One trial of diffusers and peft: LoRA on SD-mini's widths, batches of 4 + 4, then 16 pictures."""
    from diffusers import DDIMScheduler

    torch.set_num_threads(1)
    unet = peer_unet()
    step = peer_step(8, unet)
    for _ in range(steps):
        step()
    noises, text = DDIMScheduler(num_train_timesteps=1000), torch.randn(1, 32, 128)
    noises.set_timesteps(25)
    with torch.inference_mode():
        x, both = torch.randn(16, 4, 16, 16), text.expand(32, -1, -1)
        for t in noises.timesteps:
            empty, named = unet(torch.cat([x, x]), t, both).sample.chunk(2)
            x = noises.step(empty + 5 * (named - empty), t, x).prev_sample


def peers(steps: int, workers: int) -> float:
    """Seconds of each of as many peers as there are workers, side by side."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda _: command([__file__, "--peer", "--steps", steps], 1), range(workers)))
    return (time.perf_counter() - start) / workers


def main() -> None:
    p = parser(__doc__)
    p.set_defaults(repeats=1)
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--together", type=int, default=8)
    p.add_argument("--workers", type=int, default=os.cpu_count())
    p.add_argument("--peer", action="store_true", help="one trial of the peer, in this process")
    options = p.parse_args()
    if options.peer:
        peer(options.steps)
        return
    rows: dict[str, list[float]] = {}
    overheads = []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            shutil.copytree(ROOT / "examples/subjects/twemoji_monkey", work / "class")  # any pictures do for a timing
            taken = {"diffusers + peft, a process per core": peers(options.steps, options.workers)}
            taken["shell loop over the published programs"] = shell_loop(work, options.steps, 1, options.threads)
            taken[f"ldm train-many, {options.together}, training alone"] = side_by_side(
                work, options.steps, options.together, options.threads
            )
            name = f"ldm sweep, {options.together} together, {options.workers} workers"
            taken[name], *overhead = by_sweep(work, options.steps, options.together, options.workers)
            overheads.append(overhead)
        for row, seconds in taken.items():
            rows.setdefault(row, []).append(seconds)
    table(rows, "shell loop over the published programs", options.json, "s per trial")
    if not options.json:
        for began, share in overheads:
            print(f"sweep: workers began after {began:.0f} s; of the rest {share:.1%} is neither training nor scoring")


if __name__ == "__main__":
    main()
