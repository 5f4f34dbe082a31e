"""LoRA files of cloneofsimo's lora: `.safetensors` with JSON metadata, and `.pt` lists of factors.

Neither format names its layers. They are numbered in the order in which a search of the model finds them, and this
order differs between LDM's and diffusers' models. In the `.safetensors`, `up` includes the scale; in the `.pt` not.
Words are in the `.safetensors` itself, and in a file of their own beside the `.pt`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import refuse_not_finite, save_safetensors, save_torch, write_all
from ldm.errors import InputError
from ldm.files import parse_json
from ldm.interchange import layers
from ldm.interchange.formats import Codec, Context, Opened, open_file
from ldm.interchange.lora import Factors, Lora, first_of, fitted, folded
from ldm.modules.encoders.tokens import EMBEDDED, grouped, read_embeddings

log = logging.getLogger(__name__)

PARTS = ("unet", "text_encoder")
CLASSES_LENGTH = 10_000  # largest length of the JSON that lists the classes
# The classes that the published code searches by default, then other choices. The first that covers a LoRA is written.
CLASSES = {
    "unet": [
        ["Attention", "CrossAttention", "GEGLU"],
        ["Attention", "CrossAttention", "GEGLU", "ResnetBlock2D"],
        ["Attention", "CrossAttention", "FeedForward", "GEGLU"],
        ["GEGLU", "ResnetBlock2D", "Transformer2DModel"],
    ],
    "text_encoder": [["CLIPAttention"], ["CLIPAttention", "CLIPMLP"]],
}


@dataclass
class Published:
    """The content of such a file: factors of each part in order, the classes that were searched, and learnt words."""

    factors: dict[str, list[Factors]]
    classes: dict[str, list[str]]
    tokens: dict[str, Tensor] = field(default_factory=dict)
    order: str | None = None  # the order of the layers, which only our own files say


# --- files


def is_published(file: Opened) -> bool:
    """Whether a file is a `.safetensors` of this format."""
    return isinstance(file.content, Mapping) and any(part in file.metadata for part in PARTS)


def read_safetensors(path: str | Path | Opened) -> Published:
    """Read a `.safetensors` file. Raises `InputError` if its metadata and its tensors disagree."""
    file = open_file(path)
    path, tensors, metadata = file.path, dict(file.content), file.metadata
    refuse_not_finite(tensors, str(path))
    tokens = {name: tensors.pop(name) for name, kind in metadata.items() if kind == EMBEDDED and name in tensors}
    try:
        numbered = {part: _take_factors(tensors, part) for part in PARTS}
        factors = {part: held for part, held in numbered.items() if held}
        classes = {part: sorted(parse_json(metadata[part], f"{path}: {part}", CLASSES_LENGTH)) for part in factors}
    except InputError:
        raise
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"{path} is not a cloneofsimo LoRA: {error} is missing or malformed") from None
    for part, held in factors.items():
        _check_shapes(held, f"{path} is not a cloneofsimo LoRA: {part}")
    if tensors or not (factors or tokens):
        raise InputError(
            f"{path} is not a cloneofsimo LoRA: unknown tensors {', '.join(list(tensors)[:3]) or '(none)'}"
        )
    return Published(factors, classes, grouped(tokens), metadata.get("order"))


def _take_factors(tensors: dict[str, Tensor], part: str) -> list[Factors]:
    """Remove the factors of a part from `tensors` and return them in the order of their numbers."""
    count = len({name.split(":")[1] for name in tensors if name.startswith(part + ":")})
    return [Factors(tensors.pop(f"{part}:{i}:down"), tensors.pop(f"{part}:{i}:up")) for i in range(count)]


def _check_shapes(factors: Sequence[Factors], place: str) -> None:
    """Raises `InputError` for factors that cannot be multiplied."""
    for number, (down, up, _) in enumerate(factors):
        if min(down.dim(), up.dim()) < 2 or not len(down) or up.flatten(1).shape[1] != len(down):
            raise InputError(f"{place}:{number} has factors of {list(down.shape)} and {list(up.shape)}")


def write_safetensors(path: str | Path, content: Published) -> None:
    """Write a `.safetensors` file: factors in fp16 with the scale inside `up`, words in fp32."""
    tensors: dict[str, Tensor] = {}
    metadata = {"order": content.order} if content.order else {}
    for part, factors in content.factors.items():
        metadata[part] = json.dumps(content.classes[part])
        for i, one in enumerate(factors):
            down, up, _ = folded(one)
            tensors |= {f"{part}:{i}:up": up.half(), f"{part}:{i}:down": down.half()}
            metadata[f"{part}:{i}:rank"] = str(one.rank)
    words = _single_vectors(content.tokens)
    tensors, metadata = tensors | words, metadata | dict.fromkeys(words, EMBEDDED)
    save_safetensors(path, tensors, metadata)


def read_list(path: str | Path | Opened) -> list[Factors]:
    """A `.pt` list [up, down, up, down, ...]; its factors are without scale."""
    file = open_file(path)
    path, content = file.path, file.content
    if (
        not isinstance(content, list)
        or len(content) % 2
        or not content
        or not all(isinstance(item, Tensor) and item.dim() in (2, 4) for item in content)
    ):
        raise InputError(f"{path} is not a cloneofsimo .pt LoRA: expected a list of up and down tensors by turns")
    refuse_not_finite({f"tensor {number}": value for number, value in enumerate(content)}, str(path))
    return [Factors(down.detach(), up.detach()) for up, down in zip(content[::2], content[1::2], strict=True)]


def text_beside(path: str | Path) -> Path:
    """Where the text encoder's list lies: `name.text_encoder.pt` beside `name.pt`."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.pt')}.text_encoder.pt")


def words_beside(path: str | Path) -> Path:
    """Where the learnt words lie: `name.ti.pt` beside `name.pt`."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.pt')}.ti.pt")


def read_pt(path: str | Path | Opened) -> Published:
    """Read a `.pt` list with the text encoder's list and the words beside it, if there are any."""
    file = open_file(path)
    factors = {"unet": read_list(file)}
    if text_beside(file.path).is_file():
        factors["text_encoder"] = read_list(text_beside(file.path))
    return Published(factors, {}, read_words_beside(file.path))


def read_words_beside(path: str | Path) -> dict[str, Tensor]:
    """The words of `name.ti.pt` beside `name.pt`, {} without one. Raises `InputError` for another content."""
    file = words_beside(path)
    found = read_embeddings(file) if file.is_file() else {}
    if any(isinstance(vectors, tuple) for vectors in found.values()):
        raise InputError(f"{file} holds a word of SDXL; expected words and their vectors for one text encoder")
    return grouped(found)


def write_pt(path: str | Path, content: Published) -> list[Path]:
    """Write `.pt` lists in fp16, and words. The scale is multiplied into `up`, as these files have no place for it.

    A text encoder's list or words beside an older file are deleted, because readers would use them with the new file.
    Raises `InputError` for a LoRA of the text encoder alone, because such files begin with the UNet's layers.
    """
    if "unet" not in content.factors:
        raise InputError(f"{path}: a .pt LoRA begins with the UNet's layers, and this one has none; use another format")
    writers: dict[Path, Callable[[Path], None]] = {}
    for part, target in (("text_encoder", text_beside(path)), ("unet", Path(path))):
        pairs = [folded(one) for one in content.factors.get(part, [])]
        if pairs:
            tensors = [tensor.half() for one in pairs for tensor in (one.up, one.down)]
            writers[target] = partial(_save, content=tensors)
    if content.tokens:
        writers[words_beside(path)] = partial(_save, content=_single_vectors(content.tokens))
    write_all(writers)
    for target in _beside(path):
        if target not in writers:
            target.unlink(missing_ok=True)
    return [Path(path), *(target for target in _beside(path) if target in writers)]


def _beside(path: str | Path) -> list[Path]:
    return [text_beside(path), words_beside(path)]


def _single_vectors(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Words as names with one vector [d] each; further ones are called as in diffusers, `<s>_1`, `<s>_2`, ..."""
    return {f"{w}_{i}" if i else w: row.float() for w, vectors in tokens.items() for i, row in enumerate(vectors)}


def _save(path: Path, content: Any) -> None:
    save_torch(path, content)


# --- to and from the neutral form


def to_lora(content: Published, model: nn.Module, source: str, order: str | None = None) -> Lora:
    """Give the factors the names of a model's layers.

    The order is the given one, or the one in the file, or the first one whose shapes fit.
    Raises `InputError` if none fits, because the file was made for another base model.
    """
    orders = [order or content.order] if order or content.order else list(layers.ORDERS)
    named: dict[str, Factors] = {}
    for part, factors in content.factors.items():
        searched = [content.classes[part]] if part in content.classes else CLASSES[part]
        named |= _fit(factors, [layers.in_order(model, part, c, o) for o in orders for c in searched], part, source)
    return Lora(named, dict(content.tokens))


def _fit(factors: Sequence[Factors], candidates: Sequence[dict], part: str, source: str) -> dict[str, Factors]:
    fitting = []
    problem = f"{source} was made for another base model: it changes {len(factors)} layers of the {part}, " + (
        f"this model has {', '.join(str(n) for n in sorted({len(c) for c in candidates}))} such"
    )
    for candidate in candidates:
        if len(candidate) != len(factors):
            continue
        try:
            pairs = zip(candidate.items(), factors, strict=True)
            fitting.append({name: fitted(one, shape, name, source) for (name, shape), one in pairs})
        except InputError as error:
            problem = str(error)
    if not fitting:
        raise InputError(problem)
    if any(list(other) != list(fitting[0]) for other in fitting[1:]):
        log.warning(
            "%s: the layers' shapes do not tell their order in the %s; taking the first that fits", source, part
        )
    return fitting[0]


def from_lora(lora: Lora, model: nn.Module, order: str = "diffusers") -> Published:
    """Number the layers for the format. Layers of the searched classes that the LoRA does not change get zeros.

    Raises `InputError` for layers that no search of the published code finds.
    """
    factors, classes = {}, {}
    rest = dict(lora.layers)
    for part, (prefix, _) in layers.parts(model).items():
        own = {name for name in lora.layers if name.startswith(prefix)}
        if not own:
            continue
        searched = ((c, layers.in_order(model, part, c, order)) for c in CLASSES[part])
        classes[part], found = next(((c, f) for c, f in searched if own <= f.keys()), ([], {}))
        rank = max(lora.layers[name].rank for name in own)
        factors[part] = [
            fitted(rest.pop(name), shape, name, "the LoRA") if name in own else _zeros(shape, rank)
            for name, shape in found.items()
        ]
    if rest:
        raise InputError(
            f"the cloneofsimo format has no place for {len(rest)} layers, e.g. {', '.join(list(rest)[:3])}"
        )
    return Published(factors, classes, dict(lora.tokens), order)


def _zeros(shape: torch.Size, rank: int) -> Factors:
    rank = min(rank, shape[0], shape[1:].numel())
    ones = (1,) * (len(shape) - 2)
    return Factors(torch.zeros(rank, *shape[1:]), torch.zeros(shape[0], rank, *ones))


# --- the published merges, which work on numbered layers and need no model


def averaged(one: Published, two: Published, alpha_1: float = 0.5, alpha_2: float = 0.5) -> Published:
    """Mode `lpl`: averages ups and downs separately. This is not the average of the changes; use `sum` for that."""
    _same_shape(one, two)
    factors = {
        part: [
            Factors(alpha_1 * a.down + alpha_2 * b.down, alpha_1 * folded(a).up + alpha_2 * folded(b).up)
            for a, b in zip(one.factors[part], two.factors[part], strict=True)
        ]
        for part in one.factors
    }
    return Published(factors, one.classes, first_of([one.tokens, two.tokens]), _order([one, two]))


def joined(contents: Sequence[Published]) -> Published:
    """Mode `ljl`: puts factors side by side, so the changes add up. Words become `<s{file}-{number}>`."""
    first = contents[0]
    for other in contents[1:]:
        _same_shape(first, other, ranks=False)
    factors = {
        part: [
            Factors(torch.cat([f.down for f in column]), torch.cat([folded(f).up for f in column], dim=1))
            for column in zip(*(content.factors[part] for content in contents), strict=True)
        ]
        for part in first.factors
    }
    tokens = {
        f"<s{i}-{j}>": content.tokens[word]
        for i, content in enumerate(contents)
        for j, word in enumerate(sorted(content.tokens))
    }
    return Published(factors, first.classes, tokens, _order(contents))


def _same_shape(one: Published, two: Published, ranks: bool = True) -> None:
    counts = [{part: len(factors) for part, factors in content.factors.items()} for content in (one, two)]
    if counts[0] != counts[1] or {p: sorted(c) for p, c in one.classes.items()} != {
        p: sorted(c) for p, c in two.classes.items()
    }:
        raise InputError(
            f"the two LoRAs change different layers: {counts[0]} of {one.classes}, {counts[1]} of {two.classes}"
        )
    if _orders_differ(one, two):
        raise InputError(f"the two LoRAs number their layers in different orders, {one.order} and {two.order}: use sum")
    for part in one.factors:
        for i, (a, b) in enumerate(zip(one.factors[part], two.factors[part], strict=True)):
            if ranks and a.rank != b.rank:
                raise InputError(
                    f"the two LoRAs have different ranks ({a.rank} and {b.rank} in {part}:{i}): "
                    "this mode needs the same, ljl and sum do not"
                )
            if a.down.shape[1:] != b.down.shape[1:] or a.up.shape[0] != b.up.shape[0]:
                raise InputError(f"the two LoRAs were made for different base models: {part}:{i} differs in shape")


def _orders_differ(one: Published, two: Published) -> bool:
    """The order of the layers. Published files do not say it; if all shapes agree with a file that does, it is used."""
    return len({one.order, two.order} - {None}) > 1


def _order(contents: Sequence[Published]) -> str | None:
    return next((content.order for content in contents if content.order), None)


def numbered(content: Published) -> Lora:
    """The neutral form with numbers (`unet:0`) as names, for computations that need no model."""
    return Lora(
        {f"{part}:{i}": one for part, factors in content.factors.items() for i, one in enumerate(factors)},
        dict(content.tokens),
    )


def alike(one: Published, two: Published) -> bool:
    """Whether a number means the same layer in both files, in the parts that both have."""

    def searched(content: Published, part: str) -> tuple:
        shapes = [(factors.up.shape[0], factors.down.shape[1:]) for factors in content.factors[part]]
        return sorted(content.classes[part]), shapes

    shared = one.factors.keys() & two.factors.keys()
    return not _orders_differ(one, two) and all(searched(one, part) == searched(two, part) for part in shared)


def renumbered(lora: Lora, like: Sequence[Published]) -> Published:
    """The inverse of `numbered`, for a result that was computed from files that are `alike`."""
    parts = first_of(content.factors for content in like)
    factors = {part: [lora.layers[f"{part}:{i}"] for i in range(len(old))] for part, old in parts.items()}
    return Published(factors, first_of(content.classes for content in like), dict(lora.tokens), _order(like))


# --- the rows


def _codec(
    recognises: Callable[[Opened], bool],
    read: Callable[[Opened], Published],
    write: Callable[[Path, Published], list[Path] | None],
    reads: Mapping[str, Callable[[Opened, Context], Any]] | None = None,
    **others: Any,
) -> Codec:
    """The neutral form of a file: layers by name, or by number if there is no model to name them."""

    def lora(file: Opened, context: Context) -> Lora:
        content = read(file)
        if context.model is None:
            return numbered(content)
        return to_lora(content, context.model, str(file.given), context.order)

    def write_lora(path: Path, value: Lora, context: Context) -> list[Path] | None:
        return write(path, from_lora(value, context.model, context.order or "diffusers"))

    return Codec(recognises, {"lora": lora, **(reads or {})}, write_lora, **others)


def _searched(file: Opened) -> dict[str, Any]:
    classes = read_safetensors(file).classes
    return {"searched classes": classes} if classes else {}


SAFETENSORS = _codec(
    is_published, read_safetensors, write_safetensors, {"words": lambda file, _: read_safetensors(file).tokens},
    notes=_searched,
)  # fmt: skip
LIST = _codec(
    lambda file: isinstance(file.content, list), read_pt, write_pt,
    {"words": lambda file, _: read_words_beside(file.path)}, beside=_beside,
)  # fmt: skip
