"""The description of each neutral form for `ldm inspect`; no model is needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import fingerprint, is_finite
from ldm.interchange import own
from ldm.interchange.custom_diffusion import Delta, LowRank
from ldm.interchange.kinds import Kinds, rank_of
from ldm.interchange.lora import Factors, Lora, norm
from ldm.interchange.names import UNET
from ldm.models.bases import recognise
from ldm.modules.encoders.tokens import Vectors
from ldm.modules.folders import names_adapter, read_folder


def of_lora(lora: Lora) -> dict[str, Any]:
    """Layers, ranks, scales, norms, words."""
    norms = {name: norm(factors) for name, factors in lora.layers.items()}
    widths = sorted({factors.down.flatten(1).shape[1] for factors in lora.layers.values()})
    return {
        "layers": len(lora.layers),
        "ranks": lora.ranks(),
        "scales": sorted({round(factors.scale, 6) for factors in lora.layers.values()}),
        "base": f"not named; input widths {', '.join(map(str, widths))}",
        **_norms(norms),
        **of_words(lora.tokens),
    }


def _norms(norms: Mapping[str, float]) -> dict[str, Any]:
    if not norms:
        return {}
    largest = max(norms, key=lambda name: norms[name])
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    return {"norm of the change": round(total, 6), "largest": f"{largest} ({norms[largest]:.4g})"}


def of_kinds(kinds: Kinds) -> dict[str, Any]:
    """Layers, kinds, ranks, scales, words."""
    ranks = {rank_of(part.kind, part.tensors) for part in kinds.layers.values()} - {None}
    return {
        "layers": len(kinds.layers),
        "kinds": kinds.names(),
        "ranks": sorted(ranks),
        "scales": sorted({round(part.scale, 6) for part in kinds.layers.values()}),
        "parameters": sum(value.numel() for part in kinds.layers.values() for value in part.tensors.values()),
        **of_words(kinds.tokens),
    }


def of_words(words: Mapping[str, Vectors]) -> dict[str, Any]:
    """Vectors, widths and norms."""
    parts = {word: v if isinstance(v, tuple) else (v,) for word, v in words.items()}
    lines = {word: " and ".join(map(_of_vectors, own)) for word, own in parts.items()}
    return {"words": lines} if lines else {}


def _of_vectors(vectors: Tensor) -> str:
    return f"{len(vectors)} x {vectors.shape[-1]}, norm {vectors.norm(dim=-1).mean():.4g}"


def of_delta(delta: Delta) -> dict[str, Any]:
    """Weights, compressed ones and their ranks, norms, words."""
    packed = {name: value for name, value in delta.weights.items() if isinstance(value, LowRank)}
    widths = sorted({v.v.shape[1] if isinstance(v, LowRank) else v.shape[-1] for v in delta.weights.values()})
    return {
        "weights": len(delta.weights),
        "compressed": len(packed),
        **({"ranks": sorted({value.v.shape[0] for value in packed.values()})} if packed else {}),
        "base": f"not named; input widths {', '.join(map(str, widths))}",
        **_norms({name: norm(Factors(value.v, value.u)) for name, value in packed.items()}),
        **of_words(delta.tokens),
    }


def of_model(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors, parameters, and the fingerprint that folders of adapters store for their base."""
    unet = {name.removeprefix(UNET): value for name, value in weights.items() if name.startswith(UNET)}
    found, bad = recognise(weights), [name for name, value in weights.items() if not is_finite(value)]
    return {
        **({"not finite": f"{len(bad)} tensors, e.g. {bad[0]}: a damaged file"} if bad else {}),
        **({"base": found.what} if found else {}),
        "tensors": len(weights),
        "parameters": sum(value.numel() for value in weights.values()),
        "parameters of the UNet": sum(value.numel() for value in unet.values()),
        # folders of adapters store this value for the base that they were trained on
        "base fingerprint": fingerprint({name: value for name, value in unet.items() if not names_adapter(name)}),
    }


def of_folder(path: Path) -> dict[str, Any]:
    """Routes, families, words and base of a folder that training wrote."""
    held = read_folder(path)
    config, tensors = held.config, held.adapters
    if config is None:
        return {"routes": "not named (written by the published code)", "tensors": len(tensors), **_sizes(tensors)}
    routes = [
        f"{e['din']}-{e['dout']} in {len(e['blocks'])} blocks, mid_dim {e.get('mid_dim', '?')}, "
        f"{e.get('method', '?')}, scale {e['scale']:g}"
        for e in config["adapters"]
    ]
    families = [
        f"{target} {params}: {len(held)} tensors, {sum(v.numel() for v in held.values())} parameters"
        for target, params, held in own.families(path)
    ]
    notes = {key: config[key] for key in ("step", "class_word") if key in config}
    return {
        **({"routes": routes} if routes else {}),
        **({"families": families} if families else {}),
        **notes,
        "base fingerprint": config.get("base_fingerprint", "not named"),
        **_sizes(tensors),
        **of_words(own.words(path)),
    }


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if not tensors:
        return {}
    return {
        "parameters": sum(value.numel() for value in tensors.values()),
        **{"norm": round(sum(value.float().norm().item() ** 2 for value in tensors.values()) ** 0.5, 6)},
    }
