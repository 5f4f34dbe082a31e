"""Sampling at Stable Diffusion v1 size: seconds per DDIM step with guidance, without the autoencoder.

    python benchmarks/sampling.py [--size 256] [--steps 4] [--precision bf16] [--compile]

The peer is diffusers' UNet in the loop of its pipeline (scheduler DDIM, conditional and unconditional in one batch), in
the same run, with the same precision and, with --compile, compiled too. Random weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import can_compute, parser, table, timed, with_random_weights
from train_step import TOY, peer_unet

from ldm.config import find_file, instantiate_from_config, load_config
from ldm.models.building import skip_init
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.train.compiled import compile_module

CONFIG = "configs/stable-diffusion/v1-inference.yaml"


def ours(
    device: torch.device, dtype: torch.dtype, mode: str | None, size: int, steps: int, batch: int = 1, toy: bool = False
) -> Callable[[], None]:
    """Sampling as `ldm sample` does it; `mode`: how the UNet is compiled."""
    config = load_config(find_file(CONFIG)).model
    config.params.cond_stage_config = {"target": "torch.nn.Identity"}  # the text is given
    config.params.first_stage_config = {"target": "ldm.models.autoencoder.IdentityFirstStage"}
    config.params.unet_config.params.update(TOY if toy else {})
    with skip_init():
        model = instantiate_from_config(config)
    with_random_weights(model.eval().requires_grad_(False), device, dtype)
    if mode:
        compile_module(model.model.diffusion_model, mode)
    context = torch.randn(batch, 77, 768, device=device)

    def work() -> None:
        DDIMSampler(model).sample(
            steps, batch, (4, size // 8, size // 8), context, verbose=False,
            unconditional_guidance_scale=7.5, unconditional_conditioning=context * 0,
        )  # fmt: skip

    return work


def peer(
    device: torch.device, dtype: torch.dtype, mode: str | None, size: int, steps: int, batch: int = 1, toy: bool = False
) -> Callable[[], None]:
    from diffusers import DDIMScheduler

    unet = with_random_weights(peer_unet(toy).eval().requires_grad_(False), device, dtype)
    if mode:  # as diffusers' guide to speed does it
        unet.to(memory_format=torch.channels_last).compile(mode=mode, fullgraph=True)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    context = torch.randn(2 * batch, 77, 768, device=device, dtype=dtype)

    @torch.no_grad()
    def work() -> None:
        scheduler.set_timesteps(steps, device=device)
        latents = torch.randn(batch, 4, size // 8, size // 8, device=device, dtype=dtype)
        for t in scheduler.timesteps:
            empty, conditional = unet(torch.cat([latents] * 2), t, context).sample.chunk(2)
            latents = scheduler.step(empty + 7.5 * (conditional - empty), t, latents).prev_sample

    return work


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", type=int, default=256, help="picture size in pixels")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    p.add_argument("--compile", nargs="?", const="default", help="compile both UNets, in this mode of torch.compile")
    options = p.parse_args()
    if not can_compute(options.precision, options.device):
        return
    torch.set_num_threads(options.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options.precision]
    rows = {}
    for name, make in {"diffusers": peer, "ours": ours}.items():
        work = make(options.device, dtype, options.compile, options.size, options.steps)
        rows[name] = [seconds / options.steps for seconds in timed(work, options.repeats, options.device)]
    table(rows, peer="diffusers", as_json=options.json, unit="s per step")


if __name__ == "__main__":
    main()
