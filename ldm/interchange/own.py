"""Reads the folders of our own trainings (`ldm.tuning.files`) into the neutral forms.

If a folder holds more than a form can hold, it is refused, because the result would draw other pictures than the
folder. Only its words can be taken out alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.interchange.custom_diffusion import NEW_TOKENS, SAVED, Delta
from ldm.interchange.lora import Factors, Lora, weighted_sum
from ldm.interchange.peft_config import is_plain
from ldm.modules.encoders.tokens import Vectors
from ldm.modules.folders import read_config, read_folder
from ldm.tuning import choose, table
from ldm.tuning.lora import LoRA
from ldm.tuning.textual_inversion import TextualInversion

LORA = table.FAMILIES["lora"]
CROSS_ATTENTION = re.compile(r"\.attn2\.(to_[qkv]|to_out\.0)\.(weight|bias)$")
WHOLE = "lora_add --mode upl-ckpt-v2 puts all of it into a model"  # what to do instead


def families(path: str | Path) -> list[tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """(target, parameters, tensors) of each family in a folder, without position adapters.

    Raises `InputError` for an unknown family that is not allowed, see `ldm.tuning.table`.
    """
    held = read_folder(path)
    return [
        (table.target_in(e, str(path)), e["params"] or {}, {name: held.tuned[name] for name in e["tensors"]})
        for e in held.families
    ]


def lora(path: str | Path) -> Lora:
    """The LoRAs and words of a folder.

    Raises `InputError` for kinds that are not low-rank sums, for other content, and if there is no LoRA.
    """
    refuse_adapters(path, "no LoRA file can hold")
    layers: dict[str, Factors] = {}
    for target, params, tensors in families(path):
        if inversion(target, params, tensors):
            continue
        if target != LORA:
            raise InputError(f"{path} tunes more than LoRA and words ({target}): no LoRA file can hold it; {WHOLE}")
        family = LoRA(**params)
        if family.kind not in ("lora", "rslora"):
            raise InputError(
                f"{path}: {family.kind} is no low-rank sum, which is all that plain LoRA can hold: "
                "--to lycoris or peft-kinds"
            )
        refuse_changed_base(family, path)
        for name, factors in _factors(family, tensors).items():
            if name in layers:  # the changes of two families on one layer add up
                factors = weighted_sum([Lora({name: one}) for one in (layers[name], factors)], [1, 1]).layers[name]
            layers[name] = factors
    found = Lora(layers, words(path))
    if not layers and not found.tokens:
        raise InputError(f"{path} holds no LoRA")
    return found


def refuse_changed_base(family: LoRA, path: str | Path) -> None:
    """Raises `InputError` for a LoRA whose training began by changing the base."""
    if not is_plain(start := family.options.get("init_lora_weights")):
        raise InputError(
            f"{path} was trained with init_lora_weights {start!r}, so its factors belong to a changed base, which "
            f"no LoRA file can name; {WHOLE}"
        )


def _factors(family: LoRA, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The factors of a LoRA by layer, each with its scale: alpha / rank, for rsLoRA alpha / sqrt(rank)."""
    found = {}
    for name in dict.fromkeys(name.split(".lora_")[0] for name in tensors):
        down, up = (_only(tensors, f"{name}.lora_{role}.") for role in "AB")
        pattern = [pattern for pattern in family.targets if fnmatchcase(name, pattern)][-1]
        rank, alpha = down.shape[0], family.targets[pattern].get("alpha")
        size = rank if family.kind == "lora" else rank**0.5
        found[name] = Factors(down, up, (rank if alpha is None else alpha) / size)
    return found


def _only(tensors: Mapping[str, Tensor], prefix: str) -> Tensor:
    [value] = [value for name, value in tensors.items() if name.startswith(prefix)]
    return value


def folded(path: str | Path, model: nn.Module, strength: float = 1.0) -> dict[str, Tensor]:
    """All weights of a model with a folder's changes added: LoRA of every kind, and tuned base weights.

    Raises `InputError` for position adapters, because they do not change weights.
    """
    from ldm.tuning import files
    from ldm.tuning.lora import merge

    refuse_adapters(path, "cannot be folded into weights")
    files.load(model, path, strength)
    merge(model)
    return {name: value for name, value in model.state_dict().items() if NEW_TOKENS not in name}


def refuse_adapters(path: str | Path, why: str) -> None:
    """Raises `InputError` for a folder with position adapters."""
    if routes := (read_config(path) or {"adapters": ["unnamed ones"]})["adapters"]:
        raise InputError(
            f"{path} holds {len(routes)} position adapters, which {why}: sample.py takes the folder itself"
        )


def words(path: str | Path) -> dict[str, Vectors]:
    """The words of a folder with their vectors [v, d], or with the vectors for each text encoder of its base."""
    found: dict[str, Vectors] = {}
    for entry in families(path):
        if family := inversion(*entry):
            number = sum(how["vectors"] for how in family.words.values())
            rows = [_rows(part, number, path) for part in _by_encoder(entry[2])]
            for word, how in family.words.items():
                parts = [torch.cat([next(one) for _ in range(how["vectors"])]) for one in rows]
                found[word] = parts[0] if len(parts) == 1 else tuple(parts)
    return found


def _by_encoder(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The vectors of words for each text encoder, in the order of the encoders."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parts.setdefault(name.partition(NEW_TOKENS)[0], {})[name] = value
    return [parts[encoder] for encoder in sorted(parts)]


def _rows(tensors: Mapping[str, Tensor], number: int, path: str | Path) -> Iterator[Tensor]:
    """The vectors of words, [1, d] each. Raises `InputError` for other shapes or another number of vectors."""
    shapes = {tuple(value.shape) for value in tensors.values()}
    if len(tensors) != number or len(shapes) != 1 or any(len(shape) != 2 or shape[0] != 1 for shape in shapes):
        raise InputError(f"{path} is damaged: its {len(tensors)} tensors are not the {number} vectors of its words")
    return iter(tensors.values())


def inversion(target: str, params: dict[str, Any], tensors: Mapping[str, Tensor]) -> TextualInversion | None:
    """The family of an entry if it learns words, e.g. Custom Diffusion's; else None, and the family is not built."""
    if not all(NEW_TOKENS in name for name in tensors):
        return None
    family = choose({"target": target, "params": params}).family
    return family if isinstance(family, TextualInversion) else None


def delta(path: str | Path) -> Delta:
    """The tuned cross-attention of a folder as a Custom Diffusion delta, with its words.

    Raises `InputError` for other content, and if there is no tuned cross-attention.
    """
    refuse_adapters(path, "no delta can hold")
    tuned: dict[str, Tensor] = {}
    for entry in families(path):
        if not inversion(*entry):
            tuned |= entry[2]
    if foreign := [name for name in tuned if not CROSS_ATTENTION.search(name)]:
        raise InputError(
            f"{path} tunes more than weights of the cross-attention ({foreign[0]}): no delta can hold it; {WHOLE}"
        )
    if not tuned:
        raise InputError(f"{path} tunes no cross-attention ({', '.join(SAVED)})")
    return Delta(tuned, words(path))


# --- folders of runs

CONFIG = Path("configs") / "project.yaml"


def run_of(path: Path) -> Path | None:
    """The folder of the run that a path is or lies in, as `<run>/checkpoints/<name>`."""
    return next((folder for folder in (path, path.parent.parent) if (folder / CONFIG).is_file()), None)


def latest(folder: Path) -> Path:
    """The latest `<step>-adapters` of a run; the folder itself if it is none, or has saved nothing."""
    saved = {int(p.name.partition("-")[0]): p for p in (Path(folder) / "checkpoints").glob("[0-9]*-adapters")}
    return saved[max(saved)] if saved and (Path(folder) / CONFIG).is_file() else Path(folder)
