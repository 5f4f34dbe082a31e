"""SDXL's condition: the outputs of several embedders become the context, the vector and channels of the UNet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.config import instantiate_from_config
from ldm.errors import InputError
from ldm.modules.diffusionmodules.util import timestep_embedding

# The kind of an embedding by its number of dimensions, and the dimension along which embeddings of one kind are
# joined: tokens [b, n, d] by width, vectors [b, d] and pictures [b, c, h, w] by channels.
CONDITION_KEYS = {2: "vector", 3: "crossattn", 4: "concat", 5: "concat"}
JOINED_AT = {"vector": 1, "crossattn": 2, "concat": 1}


# Attributes that a conditioner sets on its embedders, under sgm's names.
ROLE = ("input_key", "input_keys", "is_trainable", "ucg_rate", "legacy_ucg_val", "ucg_prng")


class ConcatTimestepEmbedderND(nn.Module):
    """Numbers [b, n] or [b], such as sizes and crops, to their concatenated sinusoidal embeddings [b, n outdim].

    SDXL (arXiv 2307.01952), section 2.2.
    """

    def __init__(self, outdim: int) -> None:
        super().__init__()
        self.outdim = outdim

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None] if x.dim() == 1 else x
        if x.dim() != 2:
            raise InputError(f"sizes and crops must be [b, n] numbers, got the shape {list(x.shape)}")
        return rearrange(timestep_embedding(x.flatten(), self.outdim), "(b n) d -> b (n d)", b=len(x))


class GeneralConditioner(nn.Module):
    """A batch to the condition: a dict with `crossattn` [b, n, d], `vector` [b, d] and `concat` [b, c, h, w].

    Each entry of `emb_models` is `{target, params}` with `input_key` (or `input_keys`), the key of the batch that the
    embedder reads. Optional keys: `is_trainable: true`, `ucg_rate` (how often its output is dropped, for guidance) and
    `legacy_ucg_value` (which then replaces its input; without it, zeros replace its output).
    Outputs of one kind are joined in the order of the entries. Raises `InputError` for invalid entries.
    """

    def __init__(self, emb_models: Sequence[Mapping]) -> None:
        super().__init__()
        self.embedders = nn.ModuleList(_embedder(number, entry) for number, entry in enumerate(emb_models))

    def forward(
        self, batch: Mapping[str, Any], force_zero_embeddings: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """The condition. The output of embedders whose input key is in `force_zero_embeddings` is zero."""
        zeroed = set(force_zero_embeddings or ())
        parts: dict[str, list[Tensor]] = {}
        for embedder in self.embedders:
            inputs = [_dropped(embedder, _entry(batch, key)) for key in embedder.input_keys]
            learns = embedder.is_trainable or any(p.requires_grad for p in embedder.parameters())
            with nullcontext() if learns else torch.no_grad():
                answers = embedder(*inputs)
            for answer in answers if isinstance(answers, (list, tuple)) else [answers]:
                if answer.dim() not in CONDITION_KEYS:
                    raise InputError(f"{type(embedder).__name__} gave {list(answer.shape)}: expected 2 to 5 dimensions")
                if embedder.ucg_rate and embedder.legacy_ucg_val is None:
                    kept = torch.bernoulli(torch.full((len(answer),), 1 - embedder.ucg_rate, device=answer.device))
                    answer = kept.view(-1, *(1,) * (answer.dim() - 1)).to(answer) * answer
                if zeroed.intersection(embedder.input_keys):
                    answer = torch.zeros_like(answer)
                parts.setdefault(CONDITION_KEYS[answer.dim()], []).append(answer)
        return {kind: torch.cat(found, JOINED_AT[kind]) for kind, found in parts.items()}

    def get_unconditional_conditioning(
        self,
        batch_c: Mapping[str, Any],
        batch_uc: Mapping[str, Any] | None = None,
        force_uc_zero_embeddings: Iterable[str] | None = None,
        force_cond_zero_embeddings: Iterable[str] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The conditions of both sides of guidance, without dropping anything at random.

        Without `batch_uc` the unconditional side uses the same batch, with zeros for the given input keys.
        """
        with self.without_dropping():
            cond = self(batch_c, force_cond_zero_embeddings)
            return cond, self(batch_c if batch_uc is None else batch_uc, force_uc_zero_embeddings)

    def replace(self, number: int, embedder: nn.Module) -> None:
        """Replace an embedder; the new one reads the same entry of the batch."""
        for name in ROLE:
            if hasattr(self.embedders[number], name):
                setattr(embedder, name, getattr(self.embedders[number], name))
        self.embedders[number] = embedder

    @contextmanager
    def without_dropping(self):
        """Within this context, no embedder is dropped at random."""
        rates = [embedder.ucg_rate for embedder in self.embedders]
        for embedder in self.embedders:
            embedder.ucg_rate = 0.0
        try:
            yield
        finally:
            for embedder, rate in zip(self.embedders, rates, strict=True):
                embedder.ucg_rate = rate


def _embedder(number: int, entry: Mapping) -> nn.Module:
    """The embedder of an entry of `emb_models`, with its input keys and rates as attributes."""
    keys = [entry["input_key"]] if "input_key" in entry else list(entry.get("input_keys") or ())
    if not keys:
        raise InputError(f"emb_models.{number}: give input_key or input_keys, the key of the batch that it reads")
    rate = entry.get("ucg_rate") or 0.0
    if not 0 <= rate <= 1:
        raise InputError(f"emb_models.{number}: ucg_rate must be from 0 to 1, got {rate}")
    embedder = instantiate_from_config({key: entry[key] for key in ("target", "params") if key in entry})
    embedder.is_trainable, embedder.ucg_rate = bool(entry.get("is_trainable")), rate
    embedder.input_keys, embedder.legacy_ucg_val = keys, entry.get("legacy_ucg_value")
    if "input_key" in entry:
        embedder.input_key = keys[0]
    embedder.ucg_prng = np.random.RandomState()
    if not embedder.is_trainable:
        embedder.eval().requires_grad_(False)
    return embedder


def _entry(batch: Mapping[str, Any], key: str) -> Any:
    if key not in batch:
        raise InputError(f"the batch has no {key!r}, which the conditioner reads; it has {', '.join(map(str, batch))}")
    return batch[key]


def _dropped(embedder: nn.Module, value: Any) -> Any:
    """The input of an embedder, randomly replaced by its `legacy_ucg_val` for each sample."""
    if embedder.legacy_ucg_val is None or not embedder.ucg_rate:
        return value
    chosen = embedder.ucg_prng.random_sample(len(value)) < embedder.ucg_rate
    if isinstance(value, Tensor):
        value = value.clone()
        value[torch.from_numpy(chosen).to(value.device)] = embedder.legacy_ucg_val
        return value
    return [embedder.legacy_ucg_val if drop else one for one, drop in zip(value, chosen, strict=True)]
