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


def unlike(samples: Tensor, _same: Tensor) -> Tensor:
    """1 - cosine of each two samples, [n, n]: how much pictures of one prompt differ.

    DreamBooth's DIV (arXiv 2208.12242, Sec. 4.2) with the distance of this network in place of LPIPS.
    """
    return 1 - cosines(samples, samples)


def alike(tuned: Tensor, _base: Tensor) -> Tensor:
    """The cosine of each two class pictures, [n, n]; PRES of DreamBooth asks whether the class became the subject."""
    return cosines(tuned, tuned)


def alike_before(_tuned: Tensor, base: Tensor) -> Tensor:
    """The same for the class pictures of the base."""
    return cosines(base, base)


def shift(tuned: Tensor, base: Tensor) -> Tensor:
    """How much more alike each two class pictures are than those that the base draws from the same seeds, [n, n]."""
    return cosines(tuned, tuned) - cosines(base, base)


def same_seed(tuned: Tensor, base: Tensor) -> Tensor:
    """The cosine of each class picture with that of the base from the same seed, [n]; 1 if tuning changed nothing."""
    return F.cosine_similarity(tuned.float(), base.float(), dim=-1)


@dataclass(frozen=True)
class Metric:
    """A row: a function of two sets of embeddings, and what these are.

    against: what the function's second argument is, which says what its first one is: pictures of the subject, where
        they are compared with its photographs (`subject`), with their captions or with `each other`; pictures of the
        class, where they are compared with those of the `base` from the same prompts and seeds
    function: gives a value for each picture, [n], or for each two, [n, n], of which those of one prompt are averaged
    """

    title: str
    against: Literal["subject", "captions", "each other", "base"]
    function: Callable[..., Tensor]


# A column is called by the network and the row: clip_i, efficientnet_diversity, ...; `column` has the one exception.
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
    """How a metric in the eyes of a network is called: `clip_i`, and `dino` as DreamBooth has it."""
    return label if (label, metric) == ("dino", "i") else f"{label}_{metric}"


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
