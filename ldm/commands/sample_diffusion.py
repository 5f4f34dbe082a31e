"""Draw pictures from models without a text: unconditional ones, and those of a class.

    ldm sample-diffusion -r models/ldm/celeba256/model.ckpt -n 100 --batch_size 10 -c 200 -e 1.0

The config is config.yaml beside the checkpoint, that of the run whose folder or checkpoint -r names, or --config.
"""

from __future__ import annotations

import argparse
import logging
from datetime import datetime
from pathlib import Path
from typing import Any

from ldm.cli import Parser, add_allow_family, count, seed_number
from ldm.errors import InputError

log = logging.getLogger(__name__)


def add_arguments(p: Parser) -> None:
    p.add_argument("-r", "--resume", metavar="PATH", help="a checkpoint, or the folder of a run or of a model")
    p.add_argument("--config", help="config of the model, where none lies beside the checkpoint")
    add_allow_family(p)
    p.add_argument("-n", "--n_samples", type=count, default=50000, help="pictures (default 50000)")
    p.add_argument("--class_label", type=int, metavar="NUMBER", help="class, for models that have some")
    p.add_argument("-e", "--eta", type=float, default=1.0, help="of DDIM: 0 is deterministic (default 1)")
    p.add_argument("-v", "--vanilla_sample", action="store_true", help="every step of training instead of DDIM")
    p.add_argument("-c", "--custom_steps", type=count, default=50, help="steps of DDIM (default 50)")
    p.add_argument("-l", "--logdir", default="none", help="where samples/ goes (default: beside the checkpoint)")
    p.add_argument("--batch_size", type=count, default=10)
    p.add_argument("--seed", type=seed_number, default=42)
    p.add_argument("--device", help="cuda, cuda:1, mps or cpu; by default the best there is")


def run(options: argparse.Namespace) -> None:
    checkpoint, config_path = files_of(options)

    import numpy as np
    import torch
    from tqdm import tqdm

    from ldm.checkpoints import atomic_write, save_text
    from ldm.config import load_config, stored_config
    from ldm.devices import best_device
    from ldm.generate import save_png
    from ldm.models.building import untuned
    from ldm.util import load_model_from_config

    config = stored_config(config_path) if config_path.name == "project.yaml" else load_config(config_path)
    model = load_model_from_config(untuned(config), checkpoint, verbose=True).to(best_device(options.device))
    condition = condition_of(model, options)
    now = datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    root = checkpoint.parent if options.logdir == "none" else Path(options.logdir)
    folder = root / "samples" / now
    save_text(folder / "sampling_config.yaml", "\n".join(f"{key}: {value}" for key, value in vars(options).items()))
    torch.manual_seed(options.seed)
    pictures, number = [], 0
    with torch.no_grad(), model.ema_scope():
        for first in tqdm(range(0, options.n_samples, options.batch_size), desc="batches"):
            size = min(options.batch_size, options.n_samples - first)
            for picture in batch(model, condition, size, options):
                save_png(picture, folder / "img" / f"sample_{number:06}.png", {"seed": options.seed, "number": number})
                pictures.append((picture * 255).round().byte().permute(1, 2, 0).numpy())
                number += 1
    array = np.stack(pictures)
    name = "x".join(map(str, array.shape)) + "-samples.npz"
    with atomic_write(folder / "numpy" / name) as beside, open(beside, "wb") as file:
        np.savez(file, array)
    print(f"{folder / 'img'}  {number} pictures; as an array in {folder / 'numpy' / name}")


def batch(model: Any, condition: Any, size: int, options: argparse.Namespace) -> Any:
    """Pictures [size, 3, H, W] in [0, 1] on the CPU."""
    from ldm.models.diffusion.ddim import DDIMSampler

    shape = (model.channels, model.image_size, model.image_size)
    own = None if condition is None else condition.expand(size, *condition.shape[1:])
    if options.vanilla_sample:
        latents = model.p_sample_loop(own, (size, *shape), verbose=False)
    else:
        sampler = DDIMSampler(model)
        latents, _ = sampler.sample(options.custom_steps, size, shape, own, eta=options.eta, verbose=False)
    decode = getattr(model, "decode_first_stage", lambda x: x)
    return ((decode(latents).float() + 1) / 2).clamp(0, 1).cpu()


def condition_of(model: Any, options: argparse.Namespace) -> Any:
    """The encoded class label [1, ...], or None. Raises `InputError` where the model wants something else."""
    import torch

    encoder = getattr(model, "cond_stage_model", None)
    if encoder is None:
        if options.class_label is not None:
            raise InputError("--class_label: this model has no classes")
        return None
    classes = getattr(getattr(encoder, "embedding", None), "num_embeddings", None)
    if classes is None:
        raise InputError(f"this model is conditioned by {type(encoder).__name__}: use ldm sample")
    label = options.class_label
    if label is None or not 0 <= label < classes:
        raise InputError(f"this model has classes: choose one with --class_label, from 0 to {classes - 1}, got {label}")
    return model.get_learned_conditioning({encoder.key: torch.tensor([label], device=model.betas.device)})


def files_of(options: argparse.Namespace) -> tuple[Path, Path]:
    """The checkpoint and the config. Raises `InputError` where one of them is not found."""
    if not options.resume:
        raise InputError("name a checkpoint, or the folder of a run or of a model, with -r")
    given = Path(options.resume)
    places = [given] if given.is_file() else [given / "model.ckpt", given / "checkpoints" / "last.ckpt"]
    checkpoint = next((place for place in places if place.is_file()), None)
    if checkpoint is None:
        raise InputError(f"no checkpoint at {' or '.join(map(str, places))}")
    if options.config:
        from ldm.config import find_file

        return checkpoint, find_file(options.config)
    beside = [checkpoint.with_name("config.yaml"), checkpoint.parent.parent / "configs" / "project.yaml"]
    config = next((place for place in beside if place.is_file()), None)
    if config is None:
        raise InputError(f"no config at {' or '.join(map(str, beside))}: name one with --config")
    return checkpoint, config
