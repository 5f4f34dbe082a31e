"""One training step of Stable Diffusion v1 size: one picture of the subject and one of its class, adapters attn2o-ffni.

    python benchmarks/train_step.py [--size 256] [--precision bf16]

The peer is diffusers with a LoRA of rank 4 from peft on the attention layers: the same UNet, the same batch, the same
optimizer, in turns with ours. Both UNets have random weights; only the UNet's step is timed (latents and text are
given). With --precision bf16 the peer runs under autocast, as its trainers do, ours with its frozen weights in bf16.
Ours keeps freed memory, as its training commands do; the peer is timed without and with that.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from common import can_compute, in_turns, parser, table
from torch.nn import functional as F

from ldm.config import find_file, load_config, plain
from ldm.devices import cast_frozen
from ldm.models.building import skip_init
from ldm.modules.adapter_files import adapter_tensors
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.train.memory import keep_freed_memory

CONFIG = "configs/sd-inject-dreambooth/attn2o-ffni.yaml"


def fill(model: torch.nn.Module) -> None:
    """Random weights at a scale that keeps activations finite."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)


def ours(device: torch.device, checkpointing: bool | str) -> tuple[torch.nn.Module, list, Callable]:
    params = plain(load_config(find_file(CONFIG)).model.params.unet_config.params) | {"use_checkpoint": checkpointing}
    with skip_init():
        model = UNetModel(**params)
    fill(model)
    model.requires_grad_(False)
    learning = [p for name, p in model.named_parameters() if name in adapter_tensors(model)]
    for parameter in learning:
        parameter.requires_grad_(True)
    return model.to(device), learning, lambda x, t, c: model(x, t, c)


def peer(device: torch.device, checkpointing: bool) -> tuple[torch.nn.Module, list, Callable]:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    with skip_init():
        model = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    fill(model)
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.to(device).train()
    return model, [p for p in model.parameters() if p.requires_grad], lambda x, t, c: model(x, t, c).sample


def step_of(
    make: Callable,
    size: int,
    checkpointing: bool | str = False,
    autocast: bool = False,
    prepare: Sequence[Callable[[torch.nn.Module], Any]] = (),
    **options: Any,
) -> Callable[[], None]:
    """A training step of what `make` makes, after each of `prepare` did something to its UNet."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet, learning, predict = make(device, checkpointing)
    for change in prepare:
        change(unet)
    optimizer = torch.optim.AdamW(learning, lr=1e-4, **options)
    latents = torch.randn(2, 4, size // 8, size // 8, device=device)
    noise, context = torch.randn_like(latents), torch.randn(2, 77, 768, device=device)
    t = torch.tensor([100, 700], device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            predicted = predict(latents, t, context)
        F.mse_loss(predicted.float(), noise).backward()
        optimizer.step()

    return step


def keep_freed(_: torch.nn.Module) -> None:
    """As our training commands do on a CPU."""
    if not torch.cuda.is_available():
        keep_freed_memory()


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", type=int, default=256, help="picture size in pixels")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass, in both")
    options = p.parse_args()
    if not can_compute(options.precision):
        return
    half = options.precision == "bf16"
    theirs = partial(step_of, peer, options.size, options.checkpointing, autocast=half)
    halved = [partial(cast_frozen, dtype=torch.bfloat16)] if half else []
    name = f"diffusers + peft LoRA r=4, {'autocast' if half else 'fp32'}"
    mine = f"attn2o-ffni (ours), {'frozen base in bf16' if half else 'fp32'}"
    works = {
        name: theirs,
        f"{name}, freed memory kept": partial(theirs, prepare=[keep_freed]),
        mine: partial(step_of, ours, options.size, options.checkpointing, prepare=[*halved, keep_freed]),
    }
    rows, _ = in_turns(works, options.repeats, options.threads)
    table(rows, peer=name, as_json=options.json)
    if not options.json:
        print(f"{options.precision}, {options.size} pixels, {1 / statistics.median(rows[mine]):.2f} steps/s")


if __name__ == "__main__":
    main()
