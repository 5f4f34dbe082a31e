"""Memory of a training step against what `ldm plan` predicts, each in its own process.

    python benchmarks/memory.py [--cases "SD v1, bf16 base"]

On a GPU what torch allocates at its peak is measured, on a CPU how far the process grows (random weights; latents and
text are given, as with `--cache memory`). By default the cases of Stable Diffusion v1.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import parser, with_random_weights
from torch.nn import functional as F
from train_step import TOY

from ldm.config import find_file, instantiate_from_config, load_config
from ldm.models.building import skip_init
from ldm.train.footprint import measure

ADAPTER = {"transformer_adp_config": [{"din": "attn2o", "dout": "ffni", "mid_dim": 60}]}
GIB = 2**30
SD, SDXL = "configs/sd-inject-dreambooth/attn2o-ffni.yaml", "configs/sdxl/sd_xl_base.yaml"


class Case(NamedTuple):
    """A training step with one picture of the subject and one of its class."""

    config: str
    size: int
    base_precision: str
    checkpointing: bool
    toy: bool = False


CASES = {
    "SD v1, fp32": Case(SD, 512, "fp32", False),
    "SD v1, fp32, checkpointing": Case(SD, 512, "fp32", True),
    "SD v1, bf16 base": Case(SD, 512, "bf16", False),
    "SD v1, bf16 base, checkpointing": Case(SD, 512, "bf16", True),
    "SDXL, bf16 base": Case(SDXL, 1024, "bf16", False),
    "SDXL, bf16 base, checkpointing": Case(SDXL, 1024, "bf16", True),
}


def config_of(case: Case) -> Any:
    """The config of a model without encoders: latents and text states are given."""
    loaded = load_config(find_file(case.config))
    params = loaded.model.params
    name = "network_config" if "network_config" in params else "unet_config"
    params[name].params.update({"use_checkpoint": case.checkpointing, "adapter_config": ADAPTER})
    if case.toy:
        params[name].params.update({**TOY, "num_head_channels": -1, "transformer_depth": 1})
    params.train_level = ["adapter"]
    if name == "unet_config":
        params.first_stage_config = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
        params.cond_stage_config = {"target": "torch.nn.Identity"}
    return loaded


def grown() -> int:
    """The peak memory of this process since the counter was reset, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def measured(case: Case, device: torch.device) -> dict[str, float]:
    """The peak of two training steps in GiB, on a GPU also how much torch reserved for it."""
    config = config_of(case).model
    if "conditioner_config" in config.params:
        config.params.conditioner_config = None  # its output is given to the UNet directly
    with skip_init():
        model = instantiate_from_config(config)
    with_random_weights(model, device, PRECISIONS[case.base_precision]).train()
    gc.collect()
    before = 0
    if device.type == "cpu":  # neither Python nor building in fp32 belongs to the step
        weights = sum(value.numel() * value.element_size() for value in model.parameters())
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") - weights
        Path("/proc/self/clear_refs").write_text("5")
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-4)
    unet, side = model.model.diffusion_model, case.size // 8
    text = torch.randn(2, 77, unet.context_dim, device=device)
    vector = None if unet.adm_in_channels is None else torch.randn(2, unet.adm_in_channels, device=device)
    for _ in range(2):
        noise = torch.randn(2, 4, side, side, device=device)
        noisy, t = torch.randn_like(noise), torch.randint(0, 1000, (2,), device=device)
        F.mse_loss(unet(noisy, t, context=text, y=vector), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        return {"allocated": torch.cuda.max_memory_allocated(device) / GIB,
                "reserved": torch.cuda.max_memory_reserved(device) / GIB}  # fmt: skip
    return {"allocated": (grown() - before) / GIB}


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def predicted(case: Case) -> float:
    """What `ldm plan` counts, in GiB."""
    config, side = config_of(case), case.size // 8
    if "conditioner_config" in config.model.params:
        found = measure(config, [(1, case.size, case.size)] * 2, case.base_precision)
    else:
        found = measure(config, [(1, side, side, 4)] * 2, case.base_precision, caption=(77, 768))
    return (found.peak - found.encoders) / GIB


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--cases", nargs="+", choices=CASES, default=[name for name in CASES if name.startswith("SD v1")])
    p.add_argument("--one", action="store_true", help="measure one case in this process")
    options = p.parse_args()
    if options.one:
        print(json.dumps(measured(CASES[options.cases[0]], options.device)))
        return
    print(f"{'case':34}{'measured':>10}{'predicted':>11}{'ratio':>7}")
    for name in options.cases:
        words = [sys.executable, __file__, "--one", "--cases", name, "--device", str(options.device)]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        found, expected = json.loads(done.stdout.splitlines()[-1])["allocated"], predicted(CASES[name])
        print(f"{name:34}{found:6.2f} GiB{expected:7.2f} GiB{expected / found:7.2f}", flush=True)


if __name__ == "__main__":
    main()
