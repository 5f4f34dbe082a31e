"""What the recorded runs start from, made by exact arithmetic: the same bits on every CPU and under every torch."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from functools import cache
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from ldm.util import load_config, load_model_from_config

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def uniform(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers in [-1, 1] that depend on `name` alone."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    return torch.randint(-(2**20), 2**20 + 1, shape, generator=generator).float() / 2**20


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight of a network through which values keep their size; no layer is zero, so that every path counts."""
    if len(shape) > 1:
        return uniform(name, shape) * math.sqrt(3 / math.prod(shape[1:]))
    return 1 + uniform(name, shape) / 4 if name.endswith("weight") else uniform(name, shape) / 8


@cache
def base_weights() -> dict[str, torch.Tensor]:
    """The base's weights by state-dict name. They are made from the names: how the model is built changes nothing."""
    model = load_model_from_config(load_config(HERE / "base.yaml"))
    return {name: weight(name, tuple(value.shape)) for name, value in model.named_parameters()}


def make(folder: Path) -> Path:
    """Fill `folder` with base.safetensors, photos/, class/, other/, latents.safetensors and clip/."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(base_weights(), folder / "base.safetensors")
    for name, count in (("photos", 4), ("class", 3), ("other", 3)):
        (folder / name).mkdir()
        for number in range(count):
            noise = (uniform(f"{name} {number}", (6, 6, 3)) * 127.5 + 127.5).to(torch.uint8)
            Image.fromarray(noise.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()).save(
                folder / name / f"{number}.png"
            )
    captions = [f"an emoji of a {word}" for word in ("cat", "dog", "car", "man", "tree", "heart")]
    latents = torch.stack([uniform(caption, (4, 8, 8)) for caption in captions]).half()
    save_file({"latents": latents}, folder / "latents.safetensors", {"captions": json.dumps(captions)})
    _clip(folder / "clip")
    return folder


def _clip(folder: Path) -> None:
    """A folder of a CLIP of width 16 with the shipped tokenizer, and no weights."""
    folder.mkdir()
    shipped = ROOT / "models/sd-mini/clip"
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        shutil.copy(shipped / name, folder)
    config = json.loads((shipped / "config.json").read_text())
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config["projection_dim"] = 16
    config["text_config"] |= small | {"projection_dim": 16}
    config["vision_config"] |= small | {"image_size": 32, "projection_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))
