"""What is measured on pictures and on their embeddings, as pure functions."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def psnr(pictures: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, [b], for pictures [b, ...] in 0 .. 1."""
    return -10 * (pictures - references).pow(2).flatten(1).mean(1).clamp(min=1e-10).log10()


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines between all rows of a [n, d] and all of b [m, d]: [n, m]."""
    return F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T


def similarity_to(samples: Tensor, references: Tensor) -> Tensor:
    """Each sample's mean cosine to all references, [n], from embeddings [n, d] and [m, d].

    With embeddings of pictures by CLIP this is CLIP-I (DreamBooth, arXiv 2208.12242, Sec. 4.2).
    """
    return cosines(samples, references).mean(1)


def pairwise_similarity(samples: Tensor) -> Tensor:
    """The mean cosine between different rows [n, d]: 1 if all are alike."""
    n = len(samples)
    return (cosines(samples, samples).sum() - n) / (n * (n - 1))


def agreement(pictures: Tensor, captions: Tensor) -> Tensor:
    """The cosine of each picture's embedding with that of its caption, [n]: CLIP-T (arXiv 2208.12242, Sec. 4.2)."""
    return F.cosine_similarity(pictures.float(), captions.float(), dim=-1)


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
