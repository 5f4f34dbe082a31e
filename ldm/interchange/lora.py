"""The neutral form of a LoRA (arXiv 2106.09685), layer name -> (down, up, scale), and computations with it.
Every file format is read into this form and written from it.

Names are those of LDM's modules, e.g. `model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k` and
`cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.interchange import packed


class Factors(NamedTuple):
    """A low-rank change of one layer: scale * up @ down.

    Linear: down [r, in], up [out, r]; convolution: down [r, in, kh, kw], up [out, r, 1, 1]. `scale` is alpha / r.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]


@dataclass
class Lora:
    """The changes of some layers, and learnt words (word -> vectors [v, d])."""

    layers: dict[str, Factors]
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def ranks(self) -> list[int]:
        """The different ranks of the layers, ascending."""
        return sorted({factors.rank for factors in self.layers.values()})


def delta(factors: Factors) -> Tensor:
    """The change of the layer's weight, in fp32 and of the weight's shape (arXiv 2106.09685, eq. 3)."""
    down, up = factors.down.float(), factors.up.float()
    change = factors.scale * (up.flatten(1) @ down.flatten(1))
    return change.reshape(up.shape[0], *down.shape[1:])


def norm(factors: Factors) -> float:
    """The Frobenius norm of the change, computed without the full product."""
    down, up = factors.down.float().flatten(1), factors.up.float().flatten(1)
    if len(up) * down.shape[1] <= max(2**24, down.numel() + up.numel()):
        return delta(factors).norm().item()
    # |U D|^2 = tr((U^T U) (D D^T)); for a rank above both widths, the product is the smaller matrix
    return abs(factors.scale) * ((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum().item() ** 0.5


def from_delta(change: Tensor, rank: int) -> Factors:
    """The best factors of a given rank for a change of a weight (Eckart-Young); u includes the singular values."""
    u, s, vh = torch.linalg.svd(change.float().flatten(1), full_matrices=False)
    rank = min(rank, len(s))
    return shaped(vh[:rank], u[:, :rank] * s[:rank], change.shape)


def reduced(factors: Factors, rank: int) -> Factors:
    """The best factors of a lower rank, without forming the product: up @ down = Q_u (R_u R_d^T) Q_d^T."""
    down, up, scale = factors
    q_up, r_up = torch.linalg.qr(up.float().flatten(1))
    q_down, r_down = torch.linalg.qr(down.float().flatten(1).T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    rank = min(rank, len(s))
    return shaped(vh[:rank] @ q_down.T, q_up @ (u[:, :rank] * s[:rank]), (len(up), *down.shape[1:]), scale)


def shaped(down: Tensor, up: Tensor, weight: Sequence[int], scale: float = 1.0) -> Factors:
    """Factors [r, n] and [out, r] in the shapes for the weight of a linear layer or a convolution."""
    ones = (1,) * (len(weight) - 2)
    return Factors(down.reshape(len(down), *weight[1:]), up.reshape(*up.shape[:2], *ones), scale)


def rank_of(down: Tensor, name: str, source: str) -> int:
    """The rank of a layer's down factor [r, ...]. Raises `InputError` for rank 0."""
    if not len(down):
        raise InputError(f"{source}: {name} has rank 0, which changes nothing; the file is damaged")
    return len(down)


def fitted(factors: Factors, weight: Sequence[int], name: str, source: str) -> Factors:
    """Factors in the shapes for a weight. Raises `InputError` if they belong to another base model."""
    down, up, scale = factors
    inputs, rank = torch.Size(weight[1:]).numel(), rank_of(down, name, source)
    if up.flatten(1).shape[1] != rank:
        raise InputError(f"{source}: {name} has rank {rank} in its down and {up.flatten(1).shape[1]} in its up factor")
    if down.flatten(1).shape[1] != inputs or len(up) != weight[0]:
        raise InputError(
            f"{source} was made for another base model: {name} changes a weight of "
            f"{[len(up), down.flatten(1).shape[1]]}, this model's has {[weight[0], inputs]}"
        )
    return shaped(down, up, weight, scale)


def folded(factors: Factors) -> Factors:
    """The same change with a scale of 1, for formats without an alpha."""
    return Factors(factors.down, factors.up * factors.scale, 1.0)


def selected(factors: Factors, diagonal: Tensor) -> Factors:
    """The change with weighted rank-one parts: scale * up @ diag(diagonal) @ down, for convolutions as well."""
    return factors._replace(down=factors.down * diagonal.reshape(-1, *[1] * (factors.down.dim() - 1)))


def weighted_sum(loras: Sequence[Lora], weights: Sequence[float], rank: int | None = None) -> Lora:
    """The sum of weight * delta, exactly (with the factors side by side) or, with `rank`, its best approximation.

    Words are kept unscaled. If several LoRAs have a word, the first one's vectors count.
    """
    layers = {}
    for name in dict.fromkeys(name for lora in loras for name in lora.layers):
        parts = [
            (weight, lora.layers[name]) for lora, weight in zip(loras, weights, strict=True) if name in lora.layers
        ]
        if len({(f.up.shape[0], f.down.shape[1:]) for _, f in parts}) > 1:
            raise InputError(f"{name} has different shapes in the files: they were made for different base models")
        scaled = [f.up.float() * (weight * f.scale) for weight, f in parts]
        exact = Factors(torch.cat([f.down.float() for _, f in parts]), torch.cat(scaled, dim=1))
        layers[name] = exact if rank is None else reduced(exact, rank)
    return Lora(layers, first_of(lora.tokens for lora in loras))


def first_of(mappings) -> dict:
    """Merge mappings; if several have a key, the first one's value counts."""
    merged: dict = {}
    for mapping in mappings:
        merged = {**mapping, **merged}
    return merged


def distilled(
    tuned: Tensor, base: Tensor, rank: int = 4, clamp_quantile: float = 0.99, signed: bool = False
) -> Factors:
    """Low-rank factors of the difference of two weights, with extreme entries clamped.

    The limit is a quantile of the absolute entries of both factors. `signed=True` takes the quantile of the signed
    entries, as the published code does; that limit depends on the arbitrary signs of the SVD's vectors.
    """
    factors = from_delta(tuned.float() - base.float(), rank)
    return clamped(factors, clamp_quantile, signed)


def clamped(factors: Factors, quantile: float, signed: bool = False) -> Factors:
    """Factors with their entries cut at the quantile of all of them, see `distilled`."""
    entries = torch.cat([factors.up.flatten(), factors.down.flatten()])
    high = torch.quantile(entries if signed else entries.abs(), quantile).item()
    return Factors(factors.down.clamp(-high, high), factors.up.clamp(-high, high), factors.scale)


def changes(lora: Lora, weights: Mapping[str, Tensor], source: str = "the LoRA") -> dict[str, Tensor]:
    """The changes of a LoRA by parameter name. Raises `InputError` if it does not fit the model."""
    layers = packed.split(weights)
    lost = [name for name in lora.layers if f"{name}.weight" not in layers]
    if lost:
        raise InputError(
            f"{source}: this model has no layers {', '.join(lost[:3])} ({len(lost)} such); wrong base model?"
        )
    found = {
        f"{name}.weight": delta(fitted(factors, layers[f"{name}.weight"].shape, name, source))
        for name, factors in lora.layers.items()
    }
    return packed.joined(found, weights)
