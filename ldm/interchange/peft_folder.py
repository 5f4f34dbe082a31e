"""Folders of PEFT's `save_pretrained` that hold more than plain LoRA: LoHa, LoKr, DoRA, OFT, BOFT, (IA)3, `lora_bias`.

`adapter_model.safetensors` has PEFT's names of tensors, `adapter_config.json` the settings that its math needs. A
folder belongs to one network; its layers have the names that the network has in diffusers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import refuse_not_finite, save_json, save_safetensors, weights_in
from ldm.errors import InputError, short
from ldm.files import read_json
from ldm.interchange import kinds as neutral
from ldm.interchange import lora_keys, packed, peft_config
from ldm.interchange.formats import Context, Opened
from ldm.interchange.kinds import DORA, DOWN, KINDS, UP, Kinds, Part
from ldm.interchange.peft_config import CONFIG, WEIGHTS
from ldm.patterns import Patterns

log = logging.getLogger(__name__)

WRAPPED = "base_model.model."
# PEFT's name of a tensor -> ours, where it differs
TENSORS = {
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_magnitude_vector": DORA,
    "lora_magnitude_vector.weight": DORA,
    "lora_B.bias": "diff_b",
    "oft_R.weight": "oft_R",
    "ia3_l": "ia3_l",
    **{name: name for name in ("oft_R", "boft_R", "boft_s", "lokr_w1", "lokr_w2", "lokr_t2")},
    **{f"hada_{role}": f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_w{i}_{role}": f"lokr_w{i}_{role}" for i in (1, 2) for role in "ab"},
}
BIAS = "lora_B.bias"  # of `lora_bias`
# the options of a kind that its math needs
OPTIONS = {"OFT": ("coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")}
TYPES = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "OFT": "oft-peft", "BOFT": "boft-peft", "IA3": "ia3"}


def is_peft(file: Opened) -> bool:
    """Whether this is the file of such a folder. Plain LoRA is of the format `diffusers`."""
    beside = file.path.with_name(CONFIG)
    if file.path.name not in WEIGHTS or not beside.is_file() or not isinstance(file.content, Mapping):
        return False
    more = ("lora_magnitude_vector", BIAS)
    return not lora_keys.is_keyed(file.content) or any(name in str(key) for key in file.content for name in more)


def _config(file: Opened) -> Mapping[str, Any]:
    config, source = read_json(file.path.with_name(CONFIG)), file.given
    kind = config.get("peft_type") if isinstance(config, Mapping) else None
    if kind not in TYPES:
        raise InputError(f"{source} is of PEFT's type {short(kind)}; expected one of {', '.join(TYPES)}")
    peft_config.refuse_changed_start(config, file)
    if kind == "OFT" and config.get("use_cayley_neumann") and not _is_recent(config.get("peft_version")):
        log.warning("%s is of a PEFT before 0.18, which changed the series of OFT: it is read by the new one", source)
    return config


def _is_recent(given: Any) -> bool:
    """Whether a version of PEFT is at least 0.18, the first that a configuration names."""
    numbers = re.match(r"(\d+)\.(\d+)", given) if isinstance(given, str) else None
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= (0, 18)


def read(file: Opened, names: Mapping[str, str] | None = None) -> Kinds:
    """The changes of a folder by LDM's layer names or, without `names` (theirs -> LDM's), by the folder's own.

    Raises `InputError` for unknown keys, damaged settings, and tensors that are not finite or belong to no kind.
    """
    source, config = str(file.given), _config(file)
    weights = weights_in(file.content, source)
    refuse_not_finite(weights, source)
    grouped: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in weights.items():
        end = next((end for end in TENSORS if key.endswith(f".{end}")), None)
        layer = key.removesuffix(f".{end}").removeprefix(WRAPPED)
        if end is None or (names is not None and layer not in names):
            unknown.append(key)
        else:
            grouped.setdefault(layer, {})[TENSORS[end]] = value
    if unknown:
        raise lora_keys.beside_lora(file, unknown)
    patterns = Patterns(f"{source}: {CONFIG} is damaged")
    try:
        parts = {layer: _part(layer, tensors, config, patterns, source) for layer, tensors in grouped.items()}
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{source}: {CONFIG} is damaged ({error!r})") from None
    return Kinds({layer if names is None else names[layer]: part for layer, part in parts.items()})


def _part(layer: str, tensors: dict[str, Tensor], config: Mapping[str, Any], patterns: Patterns, source: str) -> Part:
    kind = config["peft_type"]
    if "ia3_l" in tensors:
        on_input = _is_feedforward(layer, config.get("feedforward_modules") or [], patterns)
        factor = tensors["ia3_l"].float().flatten() - 1
        return Part("ia3", {"weight": factor, "on_input": torch.tensor(int(on_input))},
                    options={"with_bias": not on_input})  # fmt: skip
    if DORA in tensors:
        tensors[DORA] = tensors[DORA].flatten()
    part = neutral.part_of(layer, tensors, source)
    if part.kind != TYPES[kind]:
        raise InputError(f"{source}: {short(layer)} is {KINDS[part.kind].title}, but {CONFIG} says {kind}")
    if kind in ("OFT", "BOFT"):
        return Part(
            part.kind, tensors, options={name: config[name] for name in OPTIONS.get(kind, ()) if name in config}
        )
    scale = _scale(layer, part, config, patterns, source)
    if "diff_b" in tensors:  # the bias of `lora_B` is scaled as its weight is
        tensors["diff_b"] = scale * tensors["diff_b"].float()
    return Part(part.kind, tensors, scale)


def _is_feedforward(layer: str, modules: Any, patterns: Patterns) -> bool:
    """As PEFT matches names: a pattern for the whole name, or endings."""
    if isinstance(modules, str):
        return bool(patterns.fullmatch(modules, layer))
    return any(layer.endswith(name) for name in modules)


def _scale(layer: str, part: Part, config: Mapping[str, Any], patterns: Patterns, source: str) -> float:
    """alpha / r, with the patterns of PEFT; rsLoRA (2312.03732): alpha / sqrt(r)."""
    rank = _by_pattern(layer, config.get("rank_pattern"), config.get("r"), patterns)
    alpha = config.get("lora_alpha" if part.kind == "lora" else "alpha")
    alpha = _by_pattern(layer, config.get("alpha_pattern"), alpha, patterns)
    rank = neutral.rank_of(part.kind, part.tensors) or rank
    if not isinstance(rank, int) or rank < 1:
        raise InputError(f"{source}: the rank of {short(layer)} must be at least 1, got {short(rank)}")
    scale = neutral.finite_scale(alpha, rank, layer, source)
    return scale * rank**0.5 if config.get("use_rslora") else scale


def _by_pattern(layer: str, own: Any, default: Any, patterns: Patterns) -> Any:
    found = (value for key, value in (own or {}).items() if patterns.fullmatch(rf"(.*\.)?({key})", layer))
    return next(found, default)


# --- writing


def content(
    parts: Mapping[str, tuple[str, Part]], context: Context
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration and tensors for one network: its names of layers -> (our name, the part).

    Raises `InputError` for several kinds together, for kinds that PEFT does not have, and for what this PEFT would not
    load, which it is asked.
    """
    own = {name: part for name, (_, part) in parts.items()}
    shapes = packed.split(context.model.state_dict())
    weights = {name: shapes[f"{layer}.weight"] for name, (layer, _) in parts.items()}
    config, tensors = _described(own, weights, context.source)
    if config["peft_type"] != "BOFT":  # it builds permutation matrices as wide as its layers
        _ask_peft(config, tensors, weights, context.source)
    return config, tensors


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a configuration and tensors into a folder."""
    folder.mkdir(exist_ok=True)
    save_safetensors(folder / WEIGHTS[0], {WRAPPED + name: value for name, value in tensors.items()},
                     {"format": "pt"})  # fmt: skip
    save_json(folder / CONFIG, config)


def _described(
    parts: Mapping[str, Part], weights: Mapping[str, Tensor], source: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's configuration and tensors of layers that have one kind."""
    found = sorted({KINDS[part.kind].title for part in parts.values()})
    if len(found) > 1 or len({DORA in part.tensors for part in parts.values()}) > 1:
        raise InputError(f"{source} holds {' and '.join(found)}; a PEFT folder holds one kind: --to lycoris")
    kind = next(iter(parts.values())).kind
    types = {name: peft for peft, name in TYPES.items()}
    if kind not in types or any("diff_b" in part.tensors for part in parts.values()):
        raise InputError(f"{source} holds {found[0]}, which PEFT does not have: --to lycoris")
    config: dict[str, Any] = {
        "peft_type": types[kind], "target_modules": sorted(parts), "inference_mode": True,
        "peft_version": version("peft"),  # without one, an OFT is taken as that of an earlier version
    }  # fmt: skip
    config |= WRITERS[kind](parts, weights, source)
    tensors = {f"{layer}.{name}": value for layer, part in parts.items()
               for name, value in _peft_tensors(part, weights[layer]).items()}  # fmt: skip
    return config, tensors


def _peft_tensors(part: Part, weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a part by PEFT's names and in its shapes."""
    if part.kind == "ia3":
        shape = (1, -1, *[1] * (weight.dim() - 2))
        shape = shape if weight.dim() > 2 or bool(part.tensors["on_input"]) else (-1, 1)
        return {"ia3_l": (part["weight"].flatten() + 1).reshape(shape)}
    names = {ours: theirs for theirs, ours in reversed(TENSORS.items())}
    found = {names[name]: value.detach() for name, value in part.tensors.items()}
    if DORA in part.tensors and weight.dim() > 2:
        found[names[DORA]] = found[names[DORA]].reshape(1, -1, *[1] * (weight.dim() - 2))
    elif DORA in part.tensors:
        found[names[DORA]] = found[names[DORA]].flatten()
    return found


def _of_rank(parts: Mapping[str, Part], weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The settings of kinds with a rank: r, alpha, and their patterns; for LoKr its factor."""
    kind = next(iter(parts.values())).kind
    ranks = _ranks(parts)
    alphas = {layer: part.scale * ranks[layer] for layer, part in parts.items()}
    first = next(iter(parts))
    found = {
        "r": ranks[first],
        "lora_alpha" if kind == "lora" else "alpha": alphas[first],
        "rank_pattern": {f"^{layer}": rank for layer, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {f"^{layer}": alpha for layer, alpha in alphas.items() if alpha != alphas[first]},
    }
    if kind == "lora":
        return found | _dora(parts, source)
    found["use_effective_conv2d"] = any(
        "hada_t1" in part.tensors or "lokr_t2" in part.tensors for part in parts.values()
    )
    return found | (_lokr(parts, weights) if kind == "lokr" else {})


def _ranks(parts: Mapping[str, Part]) -> dict[str, int]:
    """The rank of each layer. LoKr of whole matrices has none: PEFT takes whole matrices from a large one on."""
    found = {layer: neutral.rank_of(part.kind, part.tensors) for layer, part in parts.items()}
    usual = next((rank for rank in found.values() if rank), None)
    if usual is None:
        usual = max(max(part.tensors["lokr_w2"].shape[:2]) for part in parts.values())
    return {layer: rank or usual for layer, rank in found.items()}


def _dora(parts: Mapping[str, Part], source: str) -> dict[str, Any]:
    magnitudes = [part.tensors[DORA] for part in parts.values() if DORA in part.tensors]
    if any(value.dim() > 1 and value.shape[0] == 1 for value in magnitudes):
        raise InputError(f"{source} has DoRA's magnitudes over inputs, and PEFT's are over outputs: --to lycoris")
    return {"use_dora": bool(magnitudes)}


def _lokr(parts: Mapping[str, Part], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    def sizes(part: Part) -> tuple[int, int]:
        w1 = part.tensors.get("lokr_w1")
        return tuple(w1.shape) if w1 is not None else (
            part.tensors["lokr_w1_a"].shape[0], part.tensors["lokr_w1_b"].shape[1])  # fmt: skip

    from peft.tuners.lokr.layer import factorization

    wanted = {layer: sizes(part) for layer, part in parts.items()}
    candidates = [-1, *sorted({size for pair in wanted.values() for size in pair}, reverse=True)]
    fits = (
        factor for factor in candidates
        if all(tuple(factorization(weights[layer].shape[axis], factor)[0] for axis in (0, 1)) == pair
               for layer, pair in wanted.items())
    )  # fmt: skip
    both = any("lokr_w1_a" in part.tensors for part in parts.values())
    return {"decompose_factor": next(fits, -1), "decompose_both": both}


def _oft(parts: Mapping[str, Part], weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    large = next((layer for layer, weight in weights.items() if weight.dim() > 2 and weight[0, 0].numel() > 1), None)
    if large:
        raise InputError(
            f"{source} rotates the filters of {large}, and PEFT's OFT rotates patches of the picture there: no PEFT "
            "folder can hold it; --to lycoris with --base MODEL writes what it changes"
        )
    sizes = {(1 + (1 + 8 * part.tensors["oft_R"].shape[1]) ** 0.5) / 2 for part in parts.values()}
    return {"r": 0, "oft_block_size": int(min(sizes))} | {
        name: value for name, value in next(iter(parts.values())).options.items() if name in OPTIONS["OFT"]
    }


def _boft(parts: Mapping[str, Part], _weights: Mapping[str, Tensor], _source: str) -> dict[str, Any]:
    stages, _, size, _ = next(iter(parts.values())).tensors["boft_R"].shape
    return {"boft_block_size": size, "boft_n_butterfly_factor": stages}


def _ia3(parts: Mapping[str, Part], weights: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    on_input = sorted(layer for layer, part in parts.items() if bool(part.tensors["on_input"]))
    kept = [layer for layer, part in parts.items() if layer not in on_input and not part.options.get("with_bias")]
    if kept:
        raise InputError(
            f"{source} multiplies the weight of {kept[0]} and not its bias, as LyCORIS's (IA)3 does, and PEFT "
            "multiplies both: --to lycoris"
        )
    return {"feedforward_modules": on_input}


WRITERS = {"lora": _of_rank, "loha": _of_rank, "lokr": _of_rank, "oft-peft": _oft, "boft-peft": _boft, "ia3": _ia3}


NOT_ASKED = ("peft_type", "inference_mode", "peft_version")


def _ask_peft(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str
) -> None:
    """Build these layers with PEFT, without values. Raises `InputError` if it expects other tensors."""
    import warnings

    import peft

    root = nn.Module()
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, weight in weights.items():
            *parents, last = name.split(".")
            place = root
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place._modules[parent]
            place.add_module(last, _layer(weight))
        settings = {name: value for name, value in config.items() if name not in NOT_ASKED}
        classes = {"LORA": "LoraConfig", "LOHA": "LoHaConfig", "LOKR": "LoKrConfig", "OFT": "OFTConfig",
                   "BOFT": "BOFTConfig", "IA3": "IA3Config"}  # fmt: skip
        try:
            peft.inject_adapter_in_model(getattr(peft, classes[config["peft_type"]])(**settings), root)
            expected = {name.removesuffix(".weight"): list(value.shape) for name, value in
                        peft.get_peft_model_state_dict(root).items()}  # fmt: skip
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"{source}: PEFT refuses it: {' '.join(str(error).split())}") from None
    given = {name.removesuffix(".weight"): list(value.shape) for name, value in tensors.items()}
    wrong = next((name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name)), None)
    if wrong:
        raise InputError(
            f"{source} is no adapter that PEFT can build: {wrong} has the shape {given.get(wrong, 'of nothing')}, and "
            f"PEFT expects {expected.get(wrong, 'none')}; --to lycoris keeps it"
        )


def _layer(weight: Tensor) -> nn.Module:
    if weight.dim() == 2:
        return nn.Linear(weight.shape[1], weight.shape[0])
    return nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]))
