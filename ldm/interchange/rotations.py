"""Changes of a weight by rotation: OFT (arXiv 2306.07280) and BOFT (2311.06243), in the conventions of the files.

LyCORIS and kohya rotate a layer's outputs: the rows of the weight, in blocks. PEFT rotates its inputs: the columns (of
a convolution, the filters as vectors). Neither can be written as the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.errors import InputError
from ldm.interchange.parts import Part

TINY = 1e-8


def cayley(skew: Tensor) -> Tensor:
    """(1 + Q)(1 - Q)^-1 of skew-symmetric blocks [..., b, b] (2306.07280, section 3.3): rotations."""
    one = torch.eye(skew.shape[-1])
    return torch.linalg.solve(one - skew, one + skew, left=False)


# --- of the outputs, LyCORIS and kohya


def _blocks(part: Part, outputs: int) -> Tensor:
    """The rotations of a file's `oft_blocks` [..., b, b]. Their norm is cut at alpha times the outputs.

    `options["alpha"]`: that limit; 0 means none in LyCORIS, in kohya's files (`options["kohya"]`) it stops everything.
    """
    blocks = part["oft_blocks"]
    skew = blocks - blocks.transpose(-1, -2)
    limit, norm = part.options.get("alpha", 0.0) * outputs, skew.norm()
    if part.options.get("kohya"):
        skew = skew * ((norm.clamp(max=limit) + TINY) / (norm + TINY))
    elif 0 < limit < norm + TINY:
        skew = skew * limit / (norm + TINY)
    return cayley(skew)


def of_outputs(part: Part, weight: Tensor) -> Tensor:
    """R W - W; with `rescale` [out, ...], a factor for each output."""
    return _rotated_rows(_blocks(part, len(weight)), part, weight)


def as_given(part: Part, weight: Tensor) -> Tensor:
    """The same with the rotations themselves [k, b, b], as early LyCORIS stored them."""
    return _rotated_rows(part["oft_diag"], part, weight)


def _rotated_rows(rotations: Tensor, part: Part, weight: Tensor) -> Tensor:
    rows = weight.reshape(len(rotations), rotations.shape[1], -1)
    # LyCORIS multiplies by the transposed blocks
    rotated = torch.einsum("knm,knc->kmc", rotations, rows).reshape(weight.shape)
    return _times(rotated, part, 1.0) - weight


def butterfly_of_outputs(part: Part, weight: Tensor, strength: float = 1.0) -> Tensor:
    """BOFT's product of stages (2311.06243, eq. 3): stage i rotates rows that are 2^i * b / 2 apart.

    At a strength, each stage is that share of the way from the identity.
    """
    rotations = _blocks(part, len(weight))
    half, one = rotations.shape[-1] // 2, torch.eye(rotations.shape[-1])
    rows = weight.flatten(1)
    for stage, blocks in enumerate(rotations):
        blocks = strength * blocks + (1 - strength) * one
        apart = 2**stage * half
        rows = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2)  # groups, apart, 2, columns
        shape = rows.shape
        mixed = blocks @ rows.reshape(len(blocks), blocks.shape[1], -1)
        rows = mixed.reshape(shape).transpose(1, 2).reshape(len(weight), -1)
    return _times(rows.reshape(weight.shape), part, strength) - weight


def _times(weight: Tensor, part: Part, strength: float) -> Tensor:
    if "rescale" not in part.tensors:
        return weight
    factor = part.vector("rescale", len(weight)).reshape(-1, *[1] * (weight.dim() - 1))
    return weight * (1 + strength * (factor - 1))


# --- of the inputs, PEFT


def of_inputs(part: Part, weight: Tensor) -> Tensor:
    """W R^T - W with the block-diagonal R of PEFT's OFT. Raises `InputError` for kernels above 1 x 1.

    `oft_R` [k, b (b - 1) / 2] is the upper triangle of each block. `options` are PEFT's: with `use_cayley_neumann` R
    is a truncated series; `coft` and `eps` limit each block; with `block_share` all blocks are the first; `filters`:
    a convolution's filters were rotated, as our training does (`ldm/tuning/rotation.py`).
    """
    if weight[0, 0].numel() > 1 and not part.options.get("filters"):
        raise InputError(
            "PEFT's OFT on a convolution larger than 1 x 1 rotates patches of the picture and adds them up where they "
            "overlap, which is no change of its weight: it cannot be loaded or written"
        )
    vectors, columns = part["oft_R"], weight[0].numel()
    size = round((1 + (1 + 8 * vectors.shape[1]) ** 0.5) / 2)  # of a block with that many entries above the diagonal
    skew = _skew(vectors, size)
    if part.options.get("coft"):
        limit = part.options.get("eps", 6e-5) / len(skew) ** 0.5
        norm = skew.norm(dim=(1, 2), keepdim=True)
        skew = torch.where(norm <= limit, skew, limit * skew / norm)
    if part.options.get("use_cayley_neumann", True):
        blocks = _series(skew, part.options.get("num_cayley_neumann_terms", 5))
    else:
        blocks = cayley(-skew)
    if part.options.get("block_share"):
        blocks = blocks.expand(columns // size, size, size)
    rotated = torch.einsum("okb,kcb->okc", weight.reshape(len(weight), len(blocks), size), blocks)
    return rotated.reshape(weight.shape) - weight


def _skew(vectors: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices from their upper triangles [k, n]."""
    rows, columns = torch.triu_indices(size, size, 1)
    found = vectors.new_zeros(len(vectors), size, size)
    found[:, rows, columns] = vectors
    return found - found.transpose(-1, -2)


def _series(skew: Tensor, terms: int) -> Tensor:
    """PEFT's series for (1 + Q)(1 - Q)^-1: 1 + 2 Q + 2 Q^2 + ..., the last of its terms with factor 1."""
    terms = 4 if terms == 3 else terms  # PEFT's three are four
    total = torch.eye(skew.shape[-1]).expand_as(skew)
    power = total
    for number in range(1, terms):
        power = power @ skew
        total = total + (1.0 if number == terms - 1 and number > 1 else 2.0) * power
    return total


def butterfly_of_inputs(part: Part, weight: Tensor) -> Tensor:
    """s * W B^T - W with the product B of PEFT's BOFT stages `boft_R` [m, k, b, b] and factors `boft_s` [out, 1]."""
    raw = part["boft_R"]
    rotations = cayley(-0.5 * (raw - raw.transpose(-1, -2)))
    rows = weight.flatten(1)
    width, size = rows.shape[1], raw.shape[-1]
    for stage, blocks in enumerate(rotations):
        order = _order(width, size, stage) if len(rotations) > 1 else torch.arange(width)
        # P D P^T with the permutation P[i, order[i]] = 1; the transposed stage acts on rows of the weight
        mixed = torch.empty_like(rows)
        mixed[:, order] = rows
        mixed = torch.einsum("okb,kcb->okc", mixed.reshape(len(rows), len(blocks), size), blocks).flatten(1)
        rows = mixed[:, order]
    return (part.vector("boft_s", len(weight))[:, None] * rows).reshape(weight.shape) - weight


def _order(width: int, size: int, stage: int) -> Tensor:
    """PEFT's permutation of a stage: in groups of 2^stage blocks, the even half blocks before the odd ones."""
    halves = torch.arange(width).reshape(-1, 2 * 2**stage, size // 2)
    return torch.cat([halves[:, 0::2], halves[:, 1::2]], dim=1).flatten()
