"""A whole training step of Stable Diffusion v1 size, with encoders at every step and with everything encoded once.

    python benchmarks/caches.py [--size 256] [--base_precision bf16]

The peer is the same step with the autoencoder and the text encoder at work. Random weights; one picture of the subject
and one of its class, adapters attn2o-ffni.
"""

from __future__ import annotations

import torch
from common import parser, table, timed

from ldm.config import find_file, instantiate_from_config, load_config
from ldm.devices import cast_frozen
from ldm.models.building import skip_init
from ldm.modules.cached_encoders import CachedPosteriors, CachedPrompts

CONFIG = "configs/sd-inject-dreambooth/attn2o-ffni.yaml"


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--size", type=int, default=256, help="picture size in pixels")
    p.add_argument("--base_precision", choices=("fp32", "bf16"), default="fp32")
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with skip_init():
        model = instantiate_from_config(load_config(find_file(CONFIG)).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.to(device).train()
    if options.base_precision == "bf16":
        cast_frozen(model.model.diffusion_model, torch.bfloat16)
    model.log = model.log_dict = lambda *_, **__: None  # no trainer
    ids = torch.randint(0, 49407, (2, 77))
    model.cond_stage_model.tokenize = lambda texts: ids[: len(texts)]  # its two files are not shipped
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), lr=1e-4)

    def step(pair: list[dict]) -> None:
        optimizer.zero_grad()
        model.training_step(pair, 0).backward()
        optimizer.step()

    pixels = torch.rand(1, options.size, options.size, 3, device=device) * 2 - 1
    pictures = [{"image": pixels, "caption": ["photo of a sks dog"]}, {"image": pixels, "caption": ["photo of a dog"]}]
    rows = {"encoders at every step": timed(lambda: step(pictures), options.repeats, device)}

    moments = model.first_stage_model.encode(pixels.permute(0, 3, 1, 2)).parameters.permute(0, 2, 3, 1).detach()
    known = {c: model.cond_stage_model([c])[0].detach() for pair in pictures for c in pair["caption"]}
    model.first_stage_model = CachedPosteriors(model.first_stage_model)
    model.cond_stage_model = CachedPrompts(model.cond_stage_model, known)
    encoded = [{**picture, "image": moments} for picture in pictures]
    rows["encoded once"] = timed(lambda: step(encoded), options.repeats, device)

    unet, latents = model.model.diffusion_model, torch.randn(2, 4, options.size // 8, options.size // 8, device=device)
    context, t = torch.stack(list(known.values())), torch.tensor([100, 700], device=device)

    def unet_step() -> None:
        optimizer.zero_grad()
        unet(latents, t, context).square().mean().backward()
        optimizer.step()

    rows["the UNet's step alone"] = timed(unet_step, options.repeats, device)
    table(rows, peer="encoders at every step", as_json=options.json)


if __name__ == "__main__":
    main()
