"""Latents that are computed once and used many times, so that training computes only the diffusion model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ldm.checkpoints import read_weights, save_safetensors
from ldm.data.captioned import uniforms
from ldm.errors import InputError, explain
from ldm.files import parse_json

CAPTIONS_LENGTH = 2**26  # letters: a million captions


class CachedLatents(Dataset):
    """Latents with captions from one file, drawn at random with replacement. All of them are in memory.

    Sample k depends only on (seed, k). With probability `ucg_rate` its caption is empty, which trains the unconditional
    model for classifier-free guidance (arXiv 2207.12598, Alg. 1).
    Raises `InputError` if the file is absent or not a cache of latents.
    """

    def __init__(self, path: str | Path, ucg_rate: float = 0.0, seed: int = 0) -> None:
        weights = read_weights(path)
        with explain(f"{path} is no cache of latents; make it with ldm cache-latents", KeyError, TypeError):
            self.latents = weights["latents"].movedim(1, -1)
            with safe_open(path, framework="pt") as file:
                self.captions = parse_json(file.metadata()["captions"], f"{path}: captions", CAPTIONS_LENGTH)
        if not isinstance(self.captions, list) or not all(isinstance(one, str) for one in self.captions):
            raise InputError(f"{path} is no cache of latents: its captions are no list of texts")
        if len(self.captions) != len(self.latents):
            raise InputError(f"{path} has {len(self.latents)} latents but {len(self.captions)} captions; make it again")
        self.ucg_rate, self.seed = ucg_rate, seed

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, k: int) -> dict[str, Tensor | str]:
        """Sample k: `image` float32 [h, w, c], the latent in the layout of pictures, and `caption` str."""
        return self.__getitems__([k])[0]

    sample = __getitem__

    def __getitems__(self, ks: Sequence[int]) -> list[dict[str, Tensor | str]]:
        u = uniforms(self.seed, torch.as_tensor(ks), 2)
        rows = (u[:, 0] * len(self)).long()
        captioned = (u[:, 1] >= self.ucg_rate).tolist()
        return [
            {"image": latent, "caption": self.captions[row] if is_captioned else ""}
            for latent, row, is_captioned in zip(self.latents[rows].float(), rows.tolist(), captioned, strict=True)
        ]


def save_latents(path: str | Path, latents: Tensor, captions: Sequence[str]) -> None:
    """Write latents [n, c, h, w] in half precision and their captions, atomically."""
    save_safetensors(path, {"latents": latents.half()}, {"captions": json.dumps(list(captions))})
