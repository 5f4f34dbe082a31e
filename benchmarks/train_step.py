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
from common import best_device, can_compute, in_turns, parser, table, with_random_weights
from torch.nn import functional as F

from ldm.config import find_file, load_config, plain
from ldm.devices import cast_frozen
from ldm.models.building import skip_init
from ldm.modules.adapter_files import adapter_tensors
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.train.memory import keep_freed_memory

CONFIG = "configs/sd-inject-dreambooth/attn2o-ffni.yaml"
# The same network at toy size, with LDM's and with diffusers' words.
TOY = {"model_channels": 32, "channel_mult": [1, 2], "attention_resolutions": [1], "num_res_blocks": 1, "num_heads": 2}
PEER_TOY = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip

Made = tuple[torch.nn.Module, list, Callable]


def ours(
    device: torch.device, checkpointing: bool | str, toy: bool = False, frozen: torch.dtype = torch.float32
) -> Made:
    params = plain(load_config(find_file(CONFIG)).model.params.unet_config.params) | {"use_checkpoint": checkpointing}
    with skip_init():
        model = UNetModel(**params | (TOY if toy else {}))
    adapters = adapter_tensors(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adapters)
    with_random_weights(model, device, frozen)
    learning = [p for p in model.parameters() if p.requires_grad]
    return model, learning, lambda x, t, c: model(x, t, c)


def peer_unet(toy: bool = False) -> torch.nn.Module:
    """diffusers' UNet of Stable Diffusion v1, not initialised."""
    from diffusers import UNet2DConditionModel

    with skip_init():
        return UNet2DConditionModel(
            **{"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64} | (PEER_TOY if toy else {})
        )


def peer(device: torch.device, checkpointing: bool, toy: bool = False, frozen: torch.dtype = torch.float32) -> Made:
    from peft import LoraConfig

    model = with_random_weights(peer_unet(toy).requires_grad_(False), device, frozen)
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    if checkpointing:
        model.enable_gradient_checkpointing()
    model.to(device).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.data = parameter.data.float()  # whatever the base is, as diffusers' trainers do
    return model, learning, lambda x, t, c: model(x, t, c).sample


def step_of(
    make: Callable[..., Made],
    size: int,
    checkpointing: bool | str = False,
    autocast: bool = False,
    prepare: Sequence[Callable[[torch.nn.Module], Any]] = (),
    device: torch.device | None = None,
    batch: int = 2,
    toy: bool = False,
    frozen: torch.dtype = torch.float32,
    **options: Any,
) -> Callable[[], None]:
    """A training step of the model that `make` builds, after each function of `prepare` changed its UNet.

    `frozen`: the type of the weights that do not learn.
    """
    device = best_device() if device is None else device
    unet, learning, predict = make(device, checkpointing, toy, frozen)
    for change in prepare:
        change(unet)
    optimizer = torch.optim.AdamW(learning, lr=1e-4, **options)
    latents = torch.randn(batch, 4, size // 8, size // 8, device=device)
    noise, context = torch.randn_like(latents), torch.randn(batch, 77, 768, device=device)
    t = torch.linspace(100, 700, batch, device=device).long()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
            predicted = predict(latents, t, context)
        F.mse_loss(predicted.float(), noise).backward()
        optimizer.step()

    return step


def keep_freed(unet: torch.nn.Module) -> None:
    """As our training commands do on a CPU."""
    if next(unet.parameters()).device.type == "cpu":
        keep_freed_memory()


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", type=int, default=256, help="picture size in pixels")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass, in both")
    options = p.parse_args()
    if not can_compute(options.precision, options.device):
        return
    half = options.precision == "bf16"
    shared = {"size": options.size, "checkpointing": options.checkpointing, "device": options.device}
    theirs = partial(step_of, peer, **shared, autocast=half)
    halved = [partial(cast_frozen, dtype=torch.bfloat16)] if half else []
    name = f"diffusers + peft LoRA r=4, {'autocast' if half else 'fp32'}"
    mine = f"attn2o-ffni (ours), {'frozen base in bf16' if half else 'fp32'}"
    works = {
        name: theirs,
        f"{name}, freed memory kept": partial(theirs, prepare=[keep_freed]),
        mine: partial(step_of, ours, **shared, prepare=[*halved, keep_freed]),
    }
    rows, _ = in_turns(works, options.repeats, options.threads)
    table(rows, peer=name, as_json=options.json)
    if not options.json:
        print(f"{options.precision}, {options.size} pixels, {1 / statistics.median(rows[mine]):.2f} steps/s")


if __name__ == "__main__":
    main()
