"""A whole training step of Stable Diffusion v1 size, with encoders at every step and with everything encoded once.

    python benchmarks/caches.py [--size 256] [--base_precision bf16]

The peer is the same step with the autoencoder and the text encoder at work. Random weights; one picture of the subject
and one of its class, adapters attn2o-ffni.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import parser, table, timed, with_random_weights

from ldm.config import find_file, instantiate_from_config, load_config
from ldm.devices import cast_frozen
from ldm.models.building import skip_init
from ldm.modules.cached_encoders import CachedPosteriors, CachedPrompts

CONFIG = "configs/sd-inject-dreambooth/attn2o-ffni.yaml"
PEER = "encoders at every step"


def whole_step(
    device: torch.device, base_precision: str, size: int, toy: bool = False
) -> Callable[[int], dict[str, list[float]]]:
    """A function that measures the seconds of each kind of step, that many times. It can be called once.

    toy: the small model in place of Stable Diffusion v1.
    """
    with skip_init():
        model = instantiate_from_config(load_config(find_file(CONFIG.replace("sd-inject-dreambooth", "sd-mini")
                                                              if toy else CONFIG)).model)  # fmt: skip
    with_random_weights(model, device).train()
    if base_precision == "bf16":
        cast_frozen(model.model.diffusion_model, torch.bfloat16)
    model.log = model.log_dict = lambda *_, **__: None  # no trainer
    if not toy:
        ids = torch.randint(0, 49407, (2, 77))
        model.cond_stage_model.tokenize = lambda texts: ids[: len(texts)]  # its two files are not shipped
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-4)
    pixels = torch.rand(1, size, size, 3, device=device) * 2 - 1
    pictures = [{"image": pixels, "caption": ["photo of a sks dog"]}, {"image": pixels, "caption": ["photo of a dog"]}]

    def step(pair: list[dict]) -> None:
        optimizer.zero_grad()
        model.training_step(pair, 0).backward()
        optimizer.step()

    def measured(repeats: int) -> dict[str, list[float]]:
        rows = {PEER: timed(lambda: step(pictures), repeats, device)}
        moments = model.first_stage_model.encode(pixels.permute(0, 3, 1, 2)).parameters.permute(0, 2, 3, 1).detach()
        known = {c: model.cond_stage_model([c])[0].detach() for pair in pictures for c in pair["caption"]}
        model.first_stage_model = CachedPosteriors(model.first_stage_model)
        model.cond_stage_model = CachedPrompts(model.cond_stage_model, known)
        encoded = [{**picture, "image": moments} for picture in pictures]
        rows["encoded once"] = timed(lambda: step(encoded), repeats, device)

        unet, side = model.model.diffusion_model, moments.shape[1]
        latents = torch.randn(2, moments.shape[3] // 2, side, side, device=device)
        context, t = torch.stack(list(known.values())), torch.tensor([100, 700], device=device)

        def unet_step() -> None:
            optimizer.zero_grad()
            unet(latents, t, context).square().mean().backward()
            optimizer.step()

        rows["the UNet's step alone"] = timed(unet_step, repeats, device)
        return rows

    return measured


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", type=int, default=256, help="picture size in pixels")
    p.add_argument("--base_precision", choices=("fp32", "bf16"), default="fp32")
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    rows = whole_step(options.device, options.base_precision, options.size)(options.repeats)
    table(rows, peer=PEER, as_json=options.json)


if __name__ == "__main__":
    main()
