"""Metrics of pictures and embeddings as pure functions, and their table."""

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
    """The mean cosine of each sample to all pictures of the subject, [n], from embeddings [n, d] and [m, d].

    CLIP-I of DreamBooth (arXiv 2208.12242, Sec. 4.2); with embeddings of DINO it is their DINO metric.
    """
    return cosines(samples, references).mean(1)


def pairwise_similarity(samples: Tensor) -> Tensor:
    """The mean cosine between different rows [n, d]: 1 if all are equal."""
    n = len(samples)
    return (cosines(samples, samples).sum() - n) / (n * (n - 1))


def clip_t(pictures: Tensor, captions: Tensor) -> Tensor:
    """The cosine of each picture's embedding to that of its caption, [n]: CLIP-T (arXiv 2208.12242, Sec. 4.2)."""
    return F.cosine_similarity(pictures.float(), captions.float(), dim=-1)


def unlike(samples: Tensor, _same: Tensor) -> Tensor:
    """1 - cosine of each pair of samples, [n, n]: how much pictures of one prompt differ.

    DreamBooth's DIV (arXiv 2208.12242, Sec. 4.2) with this network's distance instead of LPIPS.
    """
    return 1 - cosines(samples, samples)


def alike(tuned: Tensor, _base: Tensor) -> Tensor:
    """The cosine of each pair of class pictures, [n, n]; DreamBooth's PRES: whether the class has become the
    subject."""
    return cosines(tuned, tuned)


def alike_before(_tuned: Tensor, base: Tensor) -> Tensor:
    """The same for the class pictures of the base."""
    return cosines(base, base)


def shift(tuned: Tensor, base: Tensor) -> Tensor:
    """How much more similar each pair of class pictures is than the base's pair from the same seeds, [n, n]."""
    return cosines(tuned, tuned) - cosines(base, base)


def same_seed(tuned: Tensor, base: Tensor) -> Tensor:
    """The cosine of each class picture to the base's from the same seed, [n]; 1 if tuning has changed nothing."""
    return F.cosine_similarity(tuned.float(), base.float(), dim=-1)


@dataclass(frozen=True)
class Metric:
    """A row: a function of two sets of embeddings, and the sources of these.

    against: the second argument. Pictures of the subject are compared with its photographs (`subject`), with their
        captions (`captions`) or with `each other`; pictures of the class with those of the `base` from the same prompts
        and seeds function: gives a value for each picture, [n], or for each pair, [n, n]; of pairs, those of one prompt
        are averaged
    """

    title: str
    against: Literal["subject", "captions", "each other", "base"]
    function: Callable[..., Tensor]


# The name of a column is that of the network and the row: clip_i, efficientnet_diversity, ...; for the exception see
# `column`.
METRICS = {
    "i": Metric("likeness to the subject's photographs (CLIP-I, DINO)", "subject", clip_i),
    "t": Metric("likeness to the caption (CLIP-T)", "captions", clip_t),
    "diversity": Metric("unlikeness among pictures of a prompt", "each other", unlike),
    "prior_i": Metric("class pictures: likeness to all of the base's", "base", clip_i),
    "prior_same": Metric("class pictures: likeness to the base's from the same seed", "base", same_seed),
    "prior_alike": Metric("class pictures: likeness to each other", "base", alike),
    "base_alike": Metric("the base's class pictures: likeness to each other", "base", alike_before),
    "prior_shift": Metric("prior drift: prior_alike - base_alike, seed by seed", "base", shift),
}


def column(label: str, metric: str) -> str:
    """The column of a metric with a network, e.g. `clip_i`; `dino` is DreamBooth's name."""
    return label if (label, metric) == ("dino", "i") else f"{label}_{metric}"


def retrieval(queries: Tensor, candidates: Tensor, k: int = 1) -> float:
    """How often candidate i is among the k nearest neighbours of query i, from embeddings [n, d] each."""
    scores = cosines(queries, candidates)
    better = (scores > scores.diagonal()[:, None]).sum(1)
    return (better < k).float().mean().item()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of [n] values and its standard error (0 for a single value)."""
    values = values.double()
    error = values.std() / len(values) ** 0.5 if len(values) > 1 else values.new_zeros(())
    return values.mean().item(), error.item()
