"""Files of LoRAs, read without unpickling and written atomically."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import atomic_write, read_object, save_torch
from ldm.compat.lora_diffusion.layers import DEFAULT_TARGET_REPLACE, injected, known_order, pairs_of
from ldm.compat.lora_diffusion.patching import (
    extract_lora_as_tensor,
    extract_lora_ups_down,
    lora_as_json,
    monkeypatch_or_replace_lora_extended,
    tensors_of,
)
from ldm.errors import InputError
from ldm.interchange import cloneofsimo as cs
from ldm.interchange.formats import Opened
from ldm.interchange.lora import Factors

Safeloras = str | Path | Any  # a path, or an open file of `safetensors.safe_open`
Parsed = dict[str, tuple[list[Tensor], list[int], list[str]]]
ModelMap = Mapping[str, tuple[nn.Module, Collection[str]]]


def save_lora_weight(
    model: nn.Module,
    path: str | Path = "./lora.pt",
    target_replace_module: Collection[str] = DEFAULT_TARGET_REPLACE,
    save_half: bool = True,
) -> None:
    """A list [up, down, ...]. As published, it does not include the strength of `tune_lora_scale`."""
    dtype = torch.float16 if save_half else torch.float32
    extract_lora_ups_down(model, target_replace_module)  # raises for a model without a LoRA
    pairs = [(one.selected_up(), one.lora_down.weight) for one in injected(model, target_replace_module).values()]
    save_torch(path, [tensor.detach().cpu().to(dtype) for pair in pairs for tensor in pair])


def save_lora_as_json(
    model: nn.Module,
    path: str | Path = "./lora.json",
    target_replace_module: Collection[str] = DEFAULT_TARGET_REPLACE,
) -> None:
    """The same list as JSON."""
    text = lora_as_json(model, target_replace_module)
    with atomic_write(path) as beside:
        Path(beside).write_text(text, encoding="utf-8")


def save_safeloras_with_embeds(
    modelmap: ModelMap | None = None,
    embeds: Mapping[str, Tensor] | None = None,
    outpath: str | Path = "./lora.safetensors",
) -> None:
    """LoRAs of several models ({"unet": (model, classes), "text_encoder": ...}) with learnt words, as one file."""
    factors, classes, order = {}, {}, None
    for part, (model, searched) in (modelmap or {}).items():
        if part not in cs.PARTS:
            raise InputError(f"a .safetensors LoRA is of {' and '.join(cs.PARTS)}, got {part!r}")
        pairs = extract_lora_as_tensor(model, searched, as_fp16=False)
        factors[part] = [Factors(down.cpu(), up.cpu()) for up, down in pairs]
        classes[part] = sorted(searched)
        order = order or known_order(model, searched)
    tokens = {word: vector.detach().cpu().reshape(-1, vector.shape[-1]) for word, vector in (embeds or {}).items()}
    cs.write_safetensors(outpath, cs.Published(factors, classes, tokens, order))


def save_safeloras(modelmap: ModelMap | None = None, outpath: str | Path = "./lora.safetensors") -> None:
    """The same without words."""
    save_safeloras_with_embeds(modelmap, None, outpath)


def convert_loras_to_safeloras_with_embeds(
    modelmap: Mapping[str, tuple[str | Path, Collection[str], int]] | None = None,
    embeds: Mapping[str, Tensor] | None = None,
    outpath: str | Path = "./lora.safetensors",
) -> None:
    """`.pt` lists ({"unet": (path, classes, r)}) with words as one `.safetensors`; ranks are those of the tensors."""
    factors = {
        part: [Factors(down.detach(), up.detach()) for up, down in pairs_of(tensors_of(path))]
        for part, (path, _, _) in (modelmap or {}).items()
    }
    classes = {part: sorted(searched) for part, (_, searched, _) in (modelmap or {}).items()}
    tokens = {word: vector.reshape(-1, vector.shape[-1]) for word, vector in (embeds or {}).items()}
    cs.write_safetensors(outpath, cs.Published(factors, classes, tokens))


def convert_loras_to_safeloras(modelmap: Mapping | None = None, outpath: str | Path = "./lora.safetensors") -> None:
    """The same without words."""
    convert_loras_to_safeloras_with_embeds(modelmap, None, outpath)


def published(safeloras: Safeloras) -> cs.Published:
    """The content of a `.safetensors`. Raises `InputError` for an order of layers that belongs to another model."""
    if isinstance(safeloras, (str, Path)):
        content, name = cs.read_safetensors(safeloras), str(safeloras)
    else:
        name = "the opened file"
        tensors = {key: safeloras.get_tensor(key) for key in safeloras.keys()}  # noqa: SIM118
        content = cs.read_safetensors(Opened(Path(name), Path(name), tensors, safeloras.metadata() or {}))
    if content.order not in (None, "diffusers"):
        raise InputError(f"{name} numbers layers in the order {content.order}: write it anew by `ldm convert`")
    return content


def parse_safeloras(safeloras: Safeloras) -> Parsed:
    """For each model: its list [up, down, ...], its ranks and the classes that were searched."""
    content = published(safeloras)
    return {
        part: (
            [tensor for one in factors for tensor in (one.up, one.down)],
            [one.rank for one in factors],
            content.classes[part],
        )
        for part, factors in content.factors.items()
    }


def parse_safeloras_embeds(safeloras: Safeloras) -> dict[str, Tensor]:
    """The learnt words: word -> vector [d], or [v, d] for a word of several vectors."""
    tokens = published(safeloras).tokens
    return {word: vectors[0] if len(vectors) == 1 else vectors for word, vectors in tokens.items()}


def load_safeloras(path: str | Path, device: str = "cpu") -> Parsed:
    """`parse_safeloras` of a file, on a device."""
    return {
        part: ([tensor.to(device) for tensor in loras], ranks, classes)
        for part, (loras, ranks, classes) in parse_safeloras(path).items()
    }


def load_safeloras_embeds(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """`parse_safeloras_embeds` of a file, on a device."""
    return {word: vector.to(device) for word, vector in parse_safeloras_embeds(path).items()}


def load_safeloras_both(path: str | Path, device: str = "cpu") -> tuple[Parsed, dict[str, Tensor]]:
    """Both of them."""
    return load_safeloras(path, device), load_safeloras_embeds(path, device)


def monkeypatch_or_replace_safeloras(models: Any, safeloras: Safeloras | Parsed) -> None:
    """Put the LoRAs of a file into the models that are attributes of `models`, e.g. of a pipeline.

    Raises `InputError` if `models` lacks one of them, or one does not fit.
    """
    parsed: Parsed = safeloras if isinstance(safeloras, dict) else parse_safeloras(safeloras)
    for part in parsed:
        if getattr(models, part, None) is None:
            raise InputError(f"{type(models).__name__} has no {part}, which the LoRA changes")
    for part, (loras, _, classes) in parsed.items():
        monkeypatch_or_replace_lora_extended(getattr(models, part), loras, classes)


def read_words(path: str | Path) -> dict[str, Tensor]:
    """A `.pt` mapping word -> vector. Raises `InputError` for anything else."""
    content = read_object(path)
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) and v.dim() == 1 for v in content.values()):
        raise InputError(f"{path}: expected a mapping from learnt words to vectors")
    return dict(content)
