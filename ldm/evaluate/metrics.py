"""What is measured on pictures and on their embeddings, as pure functions, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F


def psnr(pictures: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, [b], for pictures [b, ...] in 0 .. 1."""
    return -10 * (pictures - references).pow(2).flatten(1).mean(1).clamp(min=1e-10).log10()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines between all rows of a [n, d] and all of b [m, d]: [n, m]."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


def clip_i(samples: Tensor, references: Tensor) -> Tensor:
    """Each sample's mean cosine to all pictures of the subject, [n], from embeddings [n, d] and [m, d].

    CLIP-I of DreamBooth (arXiv 2208.12242, Sec. 4.2); with embeddings of DINO it is their DINO metric.
    """
    return cosines(samples, references).mean(1)


def pairwise_similarity(samples: Tensor) -> Tensor:
    """The mean cosine between different rows [n, d]: 1 if all are alike."""
    n = len(samples)
    return (cosines(samples, samples).sum() - n) / (n * (n - 1))


def clip_t(pictures: Tensor, captions: Tensor) -> Tensor:
    """The cosine of each picture's embedding with that of its caption, [n]: CLIP-T (arXiv 2208.12242, Sec. 4.2)."""
    return F.cosine_similarity(pictures.float(), captions.float(), dim=-1)


@dataclass(frozen=True)
class Metric:
    """A row: what embeddings of samples [n, d] are compared with, and the function, which gives [n] or one number."""

    title: str
    against: Literal["subject", "captions", "each other"]
    function: Callable[..., Tensor]


METRICS = {
    "clip_i": Metric("CLIP-I, likeness to the subject", "subject", clip_i),
    "clip_t": Metric("CLIP-T, likeness to the caption", "captions", clip_t),
    "alike": Metric("how alike the samples are", "each other", pairwise_similarity),
}


def retrieval(queries: Tensor, candidates: Tensor, k: int = 1) -> float:
    """How often the candidate i is among the k nearest ones of the query i, from embeddings [n, d] each."""
    scores = cosines(queries, candidates)
    better = (scores > scores.diagonal()[:, None]).sum(1)
    return (better < k).float().mean().item()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of [n] values and its standard error (0 for a single value)."""
    values = values.double()
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else values.new_zeros(())
    return values.mean().item(), error.item()
