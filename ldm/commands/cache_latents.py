"""Encode draws of captioned pictures with a trained autoencoder, for training a diffusion model on them.

    python scripts/cache_latents.py --ckpt logs/<autoencoder run>/checkpoints/last.ckpt --out build/latents.safetensors
    python scripts/cache_latents.py --ckpt models/sd-mini/model.safetensors        # the autoencoder of a whole model

Prints 1 / std of the latents: the `scale_factor` of the diffusion model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.checkpoints import read_weights  # noqa: E402
from ldm.cli import Parser, run_command  # noqa: E402
from ldm.config import find_file, instantiate_from_config, load_config  # noqa: E402
from ldm.data.latents import save_latents  # noqa: E402
from ldm.devices import best_device  # noqa: E402
from ldm.models.building import load_weights  # noqa: E402

WITHIN = "first_stage_model."  # an autoencoder's names within a diffusion model


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config", default="configs/sd-mini/train/autoencoder.yaml", help="of the autoencoder's run")
    parser.add_argument("--ckpt", required=True, help="checkpoint of the autoencoder, or of a diffusion model with it")
    parser.add_argument("--out", default="build/latents.safetensors")
    parser.add_argument("--draws", type=int, default=48000, help="how many pictures to draw and encode")
    parser.add_argument("--first", type=int, default=0, help="number of the first draw")
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--device", help="cuda, mps or cpu; by default the best there is")
    options = parser.parse_args(arguments)

    config, device = load_config(find_file(options.config)), best_device(options.device)
    autoencoder = instantiate_from_config(config.model)
    weights = read_weights(options.ckpt)
    own = {n.removeprefix(WITHIN): value for n, value in weights.items() if n.startswith(WITHIN)} or weights
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


if __name__ == "__main__":
    run_command(main)
