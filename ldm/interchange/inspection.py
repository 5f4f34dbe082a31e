"""What a file is and holds, told without a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoints import fingerprint, read_weights
from ldm.interchange import DELTAS, KINDS, cloneofsimo, custom_diffusion, diffusers_model, embeddings, identify
from ldm.interchange import lora_keys as keys
from ldm.interchange.custom_diffusion import LowRank
from ldm.interchange.lora import Factors, Lora, norm
from ldm.interchange.names import UNET
from ldm.modules.folders import names_adapter, read_folder


def describe(path: str | Path) -> dict[str, Any]:
    """Kind, size, and what is in it: routes, layers, ranks, words, norms, and what is known of its base model.

    Raises `InputError` for what is of no known kind, damaged or unsafe.
    """
    path, kind = Path(path), identify(path)
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    about = {"path": str(path), "kind": kind, "what": KINDS[kind], "bytes": sum(f.stat().st_size for f in files)}
    if kind == "adapter":
        return about | _adapter(path)
    if kind == "words":
        return about | _words(embeddings.read(path))
    if kind in DELTAS:
        return about | _delta(custom_diffusion.read(path))
    if kind in ("checkpoint", "diffusers-model"):
        return about | _model(diffusers_model.read_folder(path) if path.is_dir() else read_weights(path))
    if kind in ("kohya", "diffusers"):
        return about | _lora(Lora(keys.read_factors(path)))
    content = cloneofsimo.read_safetensors(path) if kind == "cloneofsimo" else cloneofsimo.read_pt(path)
    searched = {"searched classes": content.classes} if content.classes else {}
    return about | searched | _lora(cloneofsimo.numbered(content))


def _lora(lora: Lora) -> dict[str, Any]:
    norms = {name: norm(factors) for name, factors in lora.layers.items()}
    widths = sorted({factors.down.flatten(1).shape[1] for factors in lora.layers.values()})
    return {
        "layers": len(lora.layers),
        "ranks": lora.ranks(),
        "scales": sorted({round(factors.scale, 6) for factors in lora.layers.values()}),
        "base": f"not named; input widths {', '.join(map(str, widths))}",
        **_norms(norms),
        **_words(lora.tokens),
    }


def _norms(norms: Mapping[str, float]) -> dict[str, Any]:
    if not norms:
        return {}
    largest = max(norms, key=lambda name: norms[name])
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    return {"norm of the change": round(total, 6), "largest": f"{largest} ({norms[largest]:.4g})"}


def _words(words: Mapping[str, Tensor]) -> dict[str, Any]:
    told = {w: f"{len(v)} x {v.shape[-1]}, norm {v.norm(dim=-1).mean():.4g}" for w, v in words.items()}
    return {"words": told} if told else {}


def _delta(delta: custom_diffusion.Delta) -> dict[str, Any]:
    packed = {name: value for name, value in delta.weights.items() if isinstance(value, LowRank)}
    widths = sorted({v.v.shape[1] if isinstance(v, LowRank) else v.shape[-1] for v in delta.weights.values()})
    return {
        "weights": len(delta.weights),
        "compressed": len(packed),
        **({"ranks": sorted({value.v.shape[0] for value in packed.values()})} if packed else {}),
        "base": f"not named; input widths {', '.join(map(str, widths))}",
        **_norms({name: norm(Factors(value.v, value.u)) for name, value in packed.items()}),
        **_words(delta.tokens),
    }


def _model(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    unet = {name.removeprefix(UNET): value for name, value in weights.items() if name.startswith(UNET)}
    return {
        "tensors": len(weights),
        "parameters": sum(value.numel() for value in weights.values()),
        "parameters of the UNet": sum(value.numel() for value in unet.values()),
        # what folders of adapters name as the base that they were trained on
        "base fingerprint": fingerprint({name: value for name, value in unet.items() if not names_adapter(name)}),
    }


def _adapter(path: Path) -> dict[str, Any]:
    from ldm.interchange import own

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
        **_words(own.words(path)),
    }


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    if not tensors:
        return {}
    return {
        "parameters": sum(value.numel() for value in tensors.values()),
        **{"norm": round(sum(value.float().norm().item() ** 2 for value in tensors.values()) ** 0.5, 6)},
    }
