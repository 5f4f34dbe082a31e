"""Memory of a training step against what `ldm plan` predicts, for Stable Diffusion v1 size, each in its own process.

    python benchmarks/memory.py [--size 512]

On a GPU what torch allocates at its peak is measured, on a CPU how far the process grows (random weights; latents and
text are given, as with `--cache memory`).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from common import parser

CASES = {
    "fp32": {"base_precision": "fp32", "checkpointing": False},
    "fp32, checkpointing": {"base_precision": "fp32", "checkpointing": True},
    "bf16 base": {"base_precision": "bf16", "checkpointing": False},
    "bf16 base, checkpointing": {"base_precision": "bf16", "checkpointing": True},
}
CONFIG = "configs/sd-inject-dreambooth/attn2o-ffni.yaml"
GIB = 2**30


def config(checkpointing: bool):
    from ldm.config import find_file, load_config

    loaded = load_config(find_file(CONFIG))
    params = loaded.model.params
    params.unet_config.params.use_checkpoint = checkpointing
    params.cond_stage_config = {"target": "torch.nn.Identity"}  # latents and text are given
    params.first_stage_config = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    return loaded


def grown() -> int:
    """The most memory that this process had since it was asked to count anew, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def step(base_precision: str, checkpointing: bool, size: int) -> float:
    """The peak of two training steps of the UNet in GiB."""
    from ldm.config import instantiate_from_config
    from ldm.devices import cast_frozen
    from ldm.models.building import skip_init

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with skip_init():
        model = instantiate_from_config(config(checkpointing).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    cast_frozen(model.model.diffusion_model, {"fp32": torch.float32, "bf16": torch.bfloat16}[base_precision])
    model.to(device).train()
    gc.collect()
    before = 0
    if device.type == "cpu":  # neither Python nor building in fp32 belongs to the step
        weights = sum(value.numel() * value.element_size() for value in model.parameters())
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") - weights
        Path("/proc/self/clear_refs").write_text("5")
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-4)
    side = size // 8
    latents, text = torch.randn(1, side, side, 4, device=device), torch.randn(1, 77, 768, device=device)
    batches = [{"image": latents, "caption": text}] * 2
    for _ in range(2):
        sum(loss for loss, _ in model.losses(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return (grown() - before) / GIB


def predicted(base_precision: str, checkpointing: bool, size: int) -> float:
    from ldm.train.footprint import measure

    shapes = [(1, size // 8, size // 8, 4)] * 2
    return measure(config(checkpointing), shapes, base_precision, caption=(77, 768)).peak / GIB


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", type=int, default=512)
    p.add_argument("--one", help="measure one case here, as JSON")
    options = p.parse_args()
    if options.one:
        case = json.loads(options.one)
        print(json.dumps({"measured": step(**case, size=options.size)}))
        return
    print(f"{'case':28}{'measured':>10}{'predicted':>11}{'ratio':>7}")
    for name, case in CASES.items():
        words = [sys.executable, __file__, "--one", json.dumps(case), "--size", str(options.size)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        measured, expected = json.loads(done.stdout.splitlines()[-1])["measured"], predicted(**case, size=options.size)
        print(f"{name:28}{measured:6.2f} GiB{expected:7.2f} GiB{expected / measured:7.2f}", flush=True)


if __name__ == "__main__":
    main()
