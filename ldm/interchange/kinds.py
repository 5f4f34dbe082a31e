"""The neutral form of changes that are more than plain LoRA: LoHa, LoKr, DoRA, OFT, GLoRA, (IA)3, whole differences.

A layer has a `Part`: its kind and its tensors by the names that LyCORIS gives them. A kind is a row of `KINDS` with a
function of the part and of the layer's weight, because most of these changes depend on the weight that they change.

Sources: LoRA arXiv 2106.09685, LoHa 2108.06098 (FedPara), LoKr 2212.10650 (KronA), both for diffusion in 2309.14859
(LyCORIS), DoRA 2402.09353, OFT 2306.07280, BOFT 2311.06243, GLoRA 2306.07967, (IA)3 2205.05638.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError, short
from ldm.interchange import packed, rotations
from ldm.interchange.lora import Factors, Lora, first_of
from ldm.interchange.parts import Part

UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
DORA = "dora_scale"
LARGEST = 2**28  # numbers in the factors of one layer
BIASES = ("diff_b", "b_norm")  # differences of a layer's bias


@dataclass
class Kinds:
    """The changes of some layers, by LDM's names of the layers, and learnt words (word -> vectors [v, d])."""

    layers: dict[str, Part]
    tokens: dict[str, Tensor] = field(default_factory=dict)

    def names(self) -> list[str]:
        """The different kinds, DoRA included."""
        found = {part.kind + (" with DoRA" if DORA in part.tensors else "") for part in self.layers.values()}
        return sorted(found)


# --- changes at strength 1. `weight` is fp32: linear [out, in], convolution [out, in, kh, kw]


def _lora(part: Part, _weight: Tensor) -> Tensor:
    """up @ down; with Tucker's core (CP) the kernel sits in a middle factor [r, r, kh, kw]."""
    factors = _low_rank(part)
    return factors.up.flatten(1) @ factors.down.flatten(1)


def _hadamard(part: Part, _weight: Tensor) -> Tensor:
    """(w1_a @ w1_b) * (w2_a @ w2_b), 2108.06098 prop. 1; with Tucker's cores prop. 3."""
    one, two = (_matrix(part, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    return one * two


def _kronecker(part: Part, weight: Tensor) -> Tensor:
    """w1 (x) w2, where each may be a product of two factors (2212.10650)."""
    w1 = part.get("lokr_w1")
    if w1 is None:
        w1 = _matrix(part, "lokr_w1_a", "lokr_w1_b", "lokr_t1")
    w2 = part.get("lokr_w2")
    if w2 is None:
        w2 = _matrix(part, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    if w2.dim() == 2 and weight.dim() == 4:  # the kernel is flattened into the columns
        w2 = w2.reshape(len(w2), -1, *weight.shape[2:])
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.dim() - w1.dim())), w2)


def _matrix(part: Part, a: str, b: str, core: str) -> Tensor:
    """a @ b, or with a core [i, j, ...] the sum over i, j of core[i, j, ...] a[i, p] b[j, r]."""
    if core in part.tensors:
        return torch.einsum("ij...,ip,jr->pr...", part[core], part[a], part[b])
    return part[a] @ part[b].flatten(1)


def _generalized(part: Part, weight: Tensor) -> Tensor:
    """W A1 A2 + B1 B2 (2306.07967). Files of early LyCORIS have the factors of each pair in the other order."""
    a1, a2, b1, b2 = (part[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    if "bm.weight" in part.tensors:
        low = torch.einsum("mn...,im,nj->ij...", part["bm.weight"], b1, b2)
    else:
        low = b2 @ b1 if _is_early(part, weight) else b1 @ b2
    if _is_early(part, weight):
        a1, a2 = a2, a1
    return torch.einsum("oi...,ij,jk->ok...", weight, a1, a2) + low.reshape(weight.shape)


def _is_early(part: Part, weight: Tensor) -> bool:
    """Whether a GLoRA was written before LyCORIS 2: a1 is [rank, in] there and [in, rank] now."""
    a1, a2, b1, b2 = (part.tensors[f"{name}.weight"].shape for name in ("a1", "a2", "b1", "b2"))
    early = b2[1] == b1[0] == a1[0] == a2[1]
    now = b2[0] == b1[1] == a1[1] == a2[0]
    # both fit where the rank is the width; such files are of the early version, as ComfyUI takes them
    return early and not (now and not a2[0] == weight.shape[0] == weight.shape[1])


def _rescaled(part: Part, weight: Tensor) -> Tensor:
    """W times a vector over its inputs or outputs. The file holds the difference to 1.

    `options["with_bias"]`: the bias is multiplied as well, as in PEFT.
    """
    on_input = bool(part.tensors["on_input"])
    factor = part.vector("weight", weight.shape[1 if on_input else 0])
    return weight * factor.reshape(*((1, -1) if on_input else (-1, 1)), *[1] * (weight.dim() - 2))


def _whole(part: Part, weight: Tensor) -> Tensor:
    """The difference itself."""
    difference = part.get("diff")
    return weight.new_zeros(weight.shape) if difference is None else difference


def _norm(part: Part, _weight: Tensor) -> Tensor:
    return part["w_norm"]


# --- how many numbers the products in a change have: a small file must not ask for a large one


def _sizes_of_lora(part: Part, _weight: Tensor) -> list[int]:
    core = part.tensors[MID][0, 0].numel() if MID in part.tensors else 1
    return [len(part.tensors[UP]) * part.tensors[DOWN][0].numel() * core]


def _sizes_of_hadamard(part: Part, _weight: Tensor) -> list[int]:
    return [_size(part, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2)]


def _sizes_of_kronecker(part: Part, _weight: Tensor) -> list[int]:
    return [math.prod(
        part.tensors[f"lokr_w{i}"].numel() if f"lokr_w{i}" in part.tensors
        else _size(part, f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}") for i in (1, 2)
    )]  # fmt: skip


def _size(part: Part, a: str, b: str, core: str) -> int:
    """Of `_matrix`."""
    if core in part.tensors:
        return part.tensors[a].shape[1] * part.tensors[b].shape[1] * part.tensors[core][0, 0].numel()
    return len(part.tensors[a]) * part.tensors[b][0].numel()


def _sizes_of_generalized(part: Part, weight: Tensor) -> list[int]:
    a1, a2, b1, b2 = (part.tensors[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    if _is_early(part, weight):
        a1, a2, b1, b2 = a2, a1, b2, b1
    core = part.tensors["bm.weight"][0, 0].numel() if "bm.weight" in part.tensors else 1
    rows, places = len(weight), weight[0, 0].numel()
    return [len(b1) * b2[0].numel() * core, rows * a2.shape[1] * places, len(a1) * rows * places]


@dataclass(frozen=True)
class Kind:
    """A row: the tensors that tell it, those that it needs and may have, and its change.

    Each tensor of `marks` alone tells the kind. `needs` has alternatives joined by `|`, each a list joined by `+`.
    `sizes`: of the products, each of which must be that of the weight.
    `rank`: the tensor and axis that the rank is read from. `staged`: the change takes the strength itself, because it
    is not proportional to it.
    """

    title: str
    marks: tuple[str, ...]
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()
    change: Callable[..., Tensor] = _whole
    rank: tuple[tuple[str, int], ...] = ()
    sizes: Callable[[Part, Tensor], list[int]] = lambda part, weight: []
    staged: bool = False

    def lacks(self, names: Iterable[str]) -> str | None:
        """The first need that is not met."""
        names = set(names)
        return next((n for n in self.needs if not any(set(one.split("+")) <= names for one in n.split("|"))), None)

    def knows(self, name: str) -> bool:
        """Whether a tensor belongs to the kind."""
        own = {one for need in self.needs for other in need.split("|") for one in other.split("+")}
        return name in own or name in self.may


# The first row with a mark among a layer's tensors counts.
KINDS = {
    "loha": Kind(
        "LoHa", ("hada_w1_a",), ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), ("hada_t1", "hada_t2", DORA),
        _hadamard, (("hada_w1_b", 0),), _sizes_of_hadamard,
    ),
    "lokr": Kind(
        "LoKr", ("lokr_w1", "lokr_w1_a"), ("lokr_w1|lokr_w1_a+lokr_w1_b", "lokr_w2|lokr_w2_a+lokr_w2_b"),
        ("lokr_t1", "lokr_t2", DORA), _kronecker, (("lokr_w2_b", 0), ("lokr_w1_b", 0)), _sizes_of_kronecker,
    ),
    "glora": Kind(
        "GLoRA", ("a1.weight",), ("a1.weight", "a2.weight", "b1.weight", "b2.weight"), ("bm.weight",), _generalized,
        sizes=_sizes_of_generalized,
    ),
    "ia3": Kind("(IA)3", ("on_input",), ("weight", "on_input"), change=_rescaled),
    "oft": Kind("OFT", (), ("oft_blocks",), ("rescale",), rotations.of_outputs),
    "boft": Kind("BOFT", (), ("oft_blocks",), ("rescale",), rotations.butterfly_of_outputs, staged=True),
    "oft-diag": Kind("OFT of early LyCORIS", ("oft_diag",), ("oft_diag",), change=rotations.as_given),
    "oft-peft": Kind("OFT of PEFT", ("oft_R",), ("oft_R",), change=rotations.of_inputs),
    "boft-peft": Kind("BOFT of PEFT", ("boft_R",), ("boft_R", "boft_s"), change=rotations.butterfly_of_inputs),
    "norm": Kind("norms", ("w_norm",), ("w_norm",), ("b_norm",), _norm),
    "lora": Kind("LoRA", (UP, DOWN), (UP, DOWN), (MID, DORA), _lora, ((DOWN, 0),), _sizes_of_lora),
    "full": Kind("whole differences", ("diff", "diff_b"), ("diff|diff_b",), ("diff_b",)),
}  # fmt: skip
FIXED = ("oft-peft", "boft-peft")  # of no client does a strength other than 1 mean anything


def kind_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The kind of a layer by its tensors; None for none of `KINDS`."""
    if "oft_blocks" in tensors:
        return {3: "oft", 4: "boft"}.get(tensors["oft_blocks"].dim())
    return next((name for name, row in KINDS.items() if any(mark in tensors for mark in row.marks)), None)


def part_of(layer: str, tensors: Mapping[str, Tensor], source: str, **settings: Any) -> Part:
    """The part of a layer. Raises `InputError` for tensors that belong to no kind, or not to the layer's."""
    kind = kind_of(tensors)
    if kind is None:
        raise InputError(f"{source}: {short(layer)} has {short(sorted(tensors))}, which no kind of change has")
    row = KINDS[kind]
    if missing := row.lacks(tensors):
        raise InputError(f"{source}: {short(layer)} is {row.title} without {missing}; the file is damaged")
    if foreign := [name for name in tensors if not row.knows(name) and name != "diff_b"]:
        raise InputError(f"{source}: {short(layer)} is {row.title}, which has no {short(foreign[0])}")
    return Part(kind, tensors, **settings)


def rank_of(kind: str, tensors: Mapping[str, Tensor]) -> int | None:
    """The rank of a layer's change, None where a kind has none."""
    if kind == "glora":
        return min(tensors["a1.weight"].shape[:2])
    return next((tensors[name].shape[axis] for name, axis in KINDS[kind].rank if name in tensors), None)


# --- the change of a weight


def change(part: Part, weight: Tensor, strength: float = 1.0) -> Tensor:
    """What a part adds to a weight, in fp32 and in the weight's shape.

    The strength goes linearly from the weight to the changed one (for DoRA as well, as ComfyUI and web UIs have it),
    and for BOFT in each of its stages, as in LyCORIS.
    """
    weight = weight.detach().float()
    row = KINDS[part.kind]
    if row.staged:
        return row.change(part, weight, strength)
    found = (row.change(part, weight) * part.scale).reshape(weight.shape)
    if DORA in part.tensors:
        found = decomposed(weight + found, part[DORA]) - weight
    return strength * found


def decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """The weight with norms of the given magnitude (2402.09353, eq. 5), for each output or, in older files, input.

    magnitude: [out], [out, 1, ...], or [1, in, ...].
    """
    axis = 0 if magnitude.shape[0] == weight.shape[0] else 1
    if magnitude.numel() != weight.shape[axis]:
        raise ValueError(f"dora_scale has {magnitude.numel()} numbers; expected {weight.shape[axis]}")
    norms = weight.transpose(0, axis).flatten(1).norm(dim=1) + torch.finfo(weight.dtype).eps
    shape = [1] * weight.dim()
    shape[axis] = -1
    return weight * (magnitude.flatten() / norms).reshape(shape)


def changes(kinds: Kinds, weights: Mapping[str, Tensor], source: str, strength: float = 1.0) -> dict[str, Tensor]:
    """The changes by parameter name. Raises `InputError` if they do not fit the model, or have no such strength."""
    refuse_strength(kinds, strength, source)
    found: dict[str, Tensor] = {}
    layers = packed.split(weights)
    for layer, part in kinds.layers.items():
        weight = _weight(layers, f"{layer}.weight", source)
        if any(name not in BIASES for name in part.tensors):
            found[f"{layer}.weight"] = _fitted(part, layer, weight, strength, source)
        if part.options.get("with_bias") and (bias := layers.get(f"{layer}.bias")) is not None:
            found[f"{layer}.bias"] = strength * part["weight"].flatten() * bias.float()
        for name in BIASES:
            if name in part.tensors:
                bias = _weight(layers, f"{layer}.bias", source)
                if part[name].numel() != bias.numel():
                    raise _foreign(layer, source, part[name].shape, bias.shape)
                found[f"{layer}.bias"] = strength * part[name].reshape(bias.shape)
    return packed.joined(found, weights)


def refuse_strength(kinds: Kinds, strength: float, source: str) -> None:
    """Raises `InputError` for a strength other than 1 of a rotation that defines none."""
    if strength != 1 and (fixed := [part.kind for part in kinds.layers.values() if part.kind in FIXED]):
        raise InputError(
            f"{source} is {KINDS[fixed[0]].title}: such a rotation has no strength but 1; got {strength:g}"
        )


def _weight(weights: Mapping[str, Tensor], name: str, source: str) -> Tensor:
    if name not in weights:
        raise InputError(f"{source}: this model has no weight {name}; wrong base model?")
    return weights[name]


def _fitted(part: Part, layer: str, weight: Tensor, strength: float, source: str) -> Tensor:
    try:
        if any(size != weight.numel() for size in KINDS[part.kind].sizes(part, weight)):
            raise ValueError("a product has another size than the weight")
        return change(part, weight, strength)
    except InputError as error:
        raise InputError(f"{source}: {layer}: {error}") from None
    except (RuntimeError, IndexError, ValueError):  # shapes that cannot be multiplied
        shapes = {name: list(value.shape) for name, value in part.tensors.items()}
        raise InputError(
            f"{source} was made for another base model, or is damaged: {layer}, {KINDS[part.kind].title} of "
            f"{short(shapes)}, does not fit this model's weight of {list(weight.shape)}"
        ) from None


def _foreign(layer: str, source: str, theirs: torch.Size, ours: torch.Size) -> InputError:
    return InputError(
        f"{source} was made for another base model: {layer} changes a bias of {list(theirs)}, this model's has "
        f"{list(ours)}"
    )


# --- as plain LoRA, where that is exact


def as_lora(kinds: Kinds, source: str) -> Lora:
    """The same changes as plain LoRA, exactly: LoCon, Tucker's form included, LoHa and LoKr as sums of higher rank.

    Raises `InputError` for the others.
    """
    layers = {}
    for name, part in kinds.layers.items():
        factors = _exact(part) if DORA not in part.tensors and "diff_b" not in part.tensors else None
        if factors is None:
            what = "DoRA" if DORA in part.tensors else KINDS[part.kind].title
            what = f"a difference of its bias beside {what}" if "diff_b" in part.tensors else what
            raise InputError(
                f"{source} changes {name} by {what}, which is no product of small factors: plain LoRA cannot hold it; "
                "--to lycoris keeps it"
            )
        layers[name] = factors._replace(scale=part.scale)
    return Lora(layers, kinds.tokens)


def _exact(part: Part) -> Factors | None:
    """The factors of a part; None if there are none, or not of a rank below the layer's own."""
    if part.kind == "lora":
        return _low_rank(part)
    rank, sides = _rank_as_lora(part)
    if not 0 < rank <= min(sides) or rank * sum(sides) > LARGEST:
        return None
    if part.kind == "loha" and "hada_t1" not in part.tensors:
        # row o of (A1 B1) * (A2 B2) is the sum over i, j of A1[o, i] A2[o, j] times B1[i] * B2[j]
        (a1, a2), (b1, b2) = ([part[f"hada_w{i}_{role}"].flatten(1) for i in (1, 2)] for role in "ab")
        return Factors((b1[:, None] * b2).flatten(0, 1), (a1[:, :, None] * a2[:, None]).flatten(1))
    if part.kind == "lokr" and {"lokr_w2_a", "lokr_w2_b"} <= part.tensors.keys() and "lokr_t2" not in part.tensors:
        # w1 (x) (a b) = (w1 (x) a) (1 (x) b)
        w1 = part.get("lokr_w1")
        w1 = _matrix(part, "lokr_w1_a", "lokr_w1_b", "lokr_t1") if w1 is None else w1
        return Factors(
            torch.kron(torch.eye(w1.shape[1]), part["lokr_w2_b"].flatten(1)), torch.kron(w1, part["lokr_w2_a"])
        )
    return None


def _rank_as_lora(part: Part) -> tuple[int, tuple[int, int]]:
    """The rank of a LoHa or LoKr as plain LoRA, and the sides [out, in * places] of its change; rank 0: none."""
    if part.kind == "loha":
        rank, sides = (
            len(part.tensors["hada_w1_b"]),
            (len(part.tensors["hada_w1_a"]), part.tensors["hada_w1_b"].shape[1]),
        )
        return rank * len(part.tensors["hada_w2_b"]), sides
    if part.kind != "lokr" or "lokr_w2_b" not in part.tensors:
        return 0, (0, 0)
    whole = part.tensors.get("lokr_w1")
    if whole is None:
        whole = torch.empty(len(part.tensors["lokr_w1_a"]), part.tensors["lokr_w1_b"].shape[1], device="meta")
    rows, columns = whole.shape[:2]
    a, b = part.tensors["lokr_w2_a"], part.tensors["lokr_w2_b"]
    return columns * len(b), (rows * len(a), columns * b[0].numel())


def _low_rank(part: Part) -> Factors:
    """up and down; Tucker's core is multiplied into down: [r, r, kh, kw] times [r, in, 1, 1]."""
    down, up = part[DOWN], part[UP]
    if MID in part.tensors:
        down = torch.einsum("rs...,si->ri...", part[MID], down.flatten(1))
    return Factors(down, up)


def of_lora(lora: Lora) -> Kinds:
    """A plain LoRA in this form."""
    parts = {name: Part("lora", {UP: one.up, DOWN: one.down}, one.scale) for name, one in lora.layers.items()}
    return Kinds(parts, dict(lora.tokens))


def joined(parts: Iterable[Kinds], source: str) -> Kinds:
    """Several in one. Raises `InputError` if a layer is in more than one, because such changes do not add up."""
    found: dict[str, Part] = {}
    parts = list(parts)
    for one in parts:
        if twice := found.keys() & one.layers.keys():
            raise InputError(f"{source} changes {min(twice)} twice, which no file of these kinds can hold")
        found |= one.layers
    return Kinds(found, first_of(one.tokens for one in parts))


def finite_scale(alpha: Any, rank: int | None, layer: str, source: str) -> float:
    """alpha / rank; 1 without alpha or rank. Raises `InputError` for an alpha that is no finite number."""
    if alpha is None or rank is None:
        return 1.0
    if isinstance(alpha, Tensor):
        alpha = alpha.item() if alpha.numel() == 1 else tuple(alpha.shape)
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise InputError(f"{source}: alpha of {short(layer)} must be a finite number, got {short(alpha)}")
    if rank < 1:
        raise InputError(f"{source}: {short(layer)} has rank 0, which changes nothing; the file is damaged")
    return float(alpha) / rank
