"""Encode captioned pictures with a trained autoencoder, for training a diffusion model.

    ldm cache-latents --ckpt logs/<autoencoder run>/checkpoints/last.ckpt --out build/latents.safetensors
    ldm cache-latents --ckpt models/sd-mini/model.safetensors        # the autoencoder of a whole model

Prints 1 / std of the latents: the `scale_factor` of the diffusion model.
"""

from __future__ import annotations

import argparse

from ldm.cli import Parser
from ldm.models.bases import FIRST_STAGE


def add_arguments(p: Parser) -> None:
    p.add_argument("--config", default="configs/sd-mini/train/autoencoder.yaml", help="of the autoencoder's run")
    p.add_argument("--ckpt", required=True, help="checkpoint of the autoencoder, or of a diffusion model with it")
    p.add_argument("--out", default="build/latents.safetensors")
    p.add_argument("--draws", type=int, default=48000, help="how many pictures to draw and encode")
    p.add_argument("--first", type=int, default=0, help="number of the first draw")
    p.add_argument("--batch_size", type=int, default=100)
    p.add_argument("--device", help="cuda, mps or cpu; by default the best there is")


def run(options: argparse.Namespace) -> None:
    import torch
    from tqdm import tqdm

    from ldm.checkpoints import read_weights
    from ldm.config import find_file, instantiate_from_config, load_config
    from ldm.data.latents import save_latents
    from ldm.devices import best_device
    from ldm.models.building import load_weights

    config, device = load_config(find_file(options.config)), best_device(options.device)
    autoencoder = instantiate_from_config(config.model)
    weights = read_weights(options.ckpt)
    own = {n.removeprefix(FIRST_STAGE): value for n, value in weights.items() if n.startswith(FIRST_STAGE)} or weights
    load_weights(autoencoder, own, options.ckpt, may_lack=lambda name: name.startswith("loss."))
    autoencoder.eval().to(device, memory_format=torch.channels_last)
    pictures = instantiate_from_config(config.data.params.train).to(device)
    latents, captions = [], []
    for first in tqdm(range(options.first, options.first + options.draws, options.batch_size), desc="batches"):
        batch = pictures.batch(range(first, min(first + options.batch_size, options.first + options.draws)))
        with torch.no_grad():
            posterior = autoencoder.encode(autoencoder.get_input(batch, "image"))
        latents.append(posterior.sample().half().cpu())
        captions += batch["caption"]
    encoded = torch.cat(latents)
    save_latents(options.out, encoded, captions)
    print(f"{options.out}: {len(encoded)} latents, scale_factor {1 / encoded.float().std():.4f}")
