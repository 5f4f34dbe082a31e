"""Sampling at Stable Diffusion v1 size: seconds per DDIM step with guidance, without the autoencoder.

    python benchmarks/sample.py [--size 256] [--steps 4] [--precision bf16] [--compile]

The peer is diffusers' UNet in the loop of its pipeline (scheduler DDIM, conditional and unconditional in one batch), in
the same run, with the same precision and, with --compile, compiled too. Random weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import can_compute, parser, table, timed
from train_step import fill

from ldm.config import find_file, instantiate_from_config, load_config
from ldm.models.building import skip_init
from ldm.models.diffusion.ddim import DDIMSampler

CONFIG = "configs/stable-diffusion/v1-inference.yaml"


def ours(device: torch.device, dtype: torch.dtype, compiled: bool, size: int, steps: int) -> Callable[[], None]:
    with skip_init():
        model = instantiate_from_config(load_config(find_file(CONFIG)).model)
    fill(model)
    model.to(device).eval()
    model.model.diffusion_model.to(dtype)
    if compiled:
        model.model.diffusion_model.compile()
    context = torch.randn(1, 77, 768, device=device)

    def work() -> None:
        DDIMSampler(model).sample(
            steps, 1, (4, size // 8, size // 8), context, verbose=False,
            unconditional_guidance_scale=7.5, unconditional_conditioning=context * 0,
        )  # fmt: skip

    return work


def peer(device: torch.device, dtype: torch.dtype, compiled: bool, size: int, steps: int) -> Callable[[], None]:
    from diffusers import DDIMScheduler, UNet2DConditionModel

    with skip_init():
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    fill(unet)
    unet.to(device, dtype).eval()
    if compiled:
        unet.compile()
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    context = torch.randn(2, 77, 768, device=device, dtype=dtype)

    @torch.no_grad()
    def work() -> None:
        scheduler.set_timesteps(steps)
        latents = torch.randn(1, 4, size // 8, size // 8, device=device, dtype=dtype)
        for t in scheduler.timesteps:
            empty, conditional = unet(torch.cat([latents] * 2), t, context).sample.chunk(2)
            latents = scheduler.step(empty + 7.5 * (conditional - empty), t, latents).prev_sample

    return work


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", type=int, default=256, help="picture size in pixels")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    p.add_argument("--compile", action="store_true", help="compile both UNets")
    options = p.parse_args()
    if not can_compute(options.precision):
        return
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    rows = {}
    for name, make in {"diffusers": peer, "ours": ours}.items():
        work = make(device, dtype, options.compile, options.size, options.steps)
        rows[name] = [seconds / options.steps for seconds in timed(work, options.repeats, device)]
    table(rows, peer="diffusers", as_json=options.json, unit="s per step")


if __name__ == "__main__":
    main()
