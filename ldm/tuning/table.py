"""The families of tuning by name, and the family that an entry of a folder means.

A folder of adapters may come from anywhere, so its names are looked up here before anything is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ldm import trust
from ldm.errors import InputError, short

FAMILIES = {
    "position": "ldm.tuning.position.PositionAdapters",
    "lora": "ldm.tuning.lora.LoRA",
    "cross-attention": "ldm.tuning.cross_attention.CrossAttention",
    "modifier-tokens": "ldm.tuning.cross_attention.ModifierTokens",
    "textual-inversion": "ldm.tuning.textual_inversion.TextualInversion",
    "unet": "ldm.tuning.full.UNet",
    "text-encoder": "ldm.tuning.full.ConditionStage",
    "weights-by-name": "ldm.tuning.full.ByName",
    "biases": "ldm.tuning.biases.Biases",
    "norms": "ldm.tuning.norms.Norms",
    "route-search": "ldm.tuning.search.RouteSearch",
}


def name_of(target: str) -> str:
    """The name of a family in folders: its name here or of its entry point, else its dotted target."""
    names = {dotted: name for name, dotted in (trust.installed_families() | FAMILIES).items()}
    return names.get(target, target)


def named(family: Any) -> str:
    """The dotted target of a family that the user's own YAML names. Raises `InputError` for an unknown name."""
    known = trust.installed_families() | FAMILIES
    if not isinstance(family, str) or family not in known:
        raise InputError(
            f"tuning: there is no family {short(family)}; expected {', '.join(known)}, or target: my.module.Family"
        )
    return known[family]


def target_in(entry: Any, source: str, present: Iterable[str] = ()) -> str:
    """The dotted target of the family that an entry of a folder means, by its `family` or, in older folders, `target`.

    `present` are the targets of families that the model has already from the user's own config. Nothing is imported.
    Raises `InputError` for a family that is not in the table, not installed (the entry points `ldm.families`), not
    allowed by the user (`--allow_family`) and not present.
    """
    asked = entry["family"] if "family" in entry else entry["target"]
    if isinstance(asked, str):
        known = trust.installed_families() | FAMILIES
        if asked in known:
            return known[asked]
        if asked in (*known.values(), *trust.allowed_families, *present):
            return asked
    raise InputError(
        f"{source} asks for the family {short(asked)}, which is not one of ours ({', '.join(FAMILIES)}) and was not "
        f"imported: if you know and trust that code, add --allow_family {asked if _dotted(asked) else 'NAME'}"
    )


def _dotted(asked: Any) -> bool:
    return isinstance(asked, str) and len(asked) < 80 and all(part.isidentifier() for part in asked.split("."))
