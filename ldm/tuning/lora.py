"""Tuning in weight space: LoRA and its variants, by the `peft` library, on linear and convolution layers.

LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353), LoHa (2108.06098), LoKr (2212.10650), OFT (2306.07280),
BOFT (2311.06243). The base weights keep their released names in the state dict, whatever is wrapped around them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ldm.devices import forked_rng
from ldm.errors import InputError, short
from ldm.tuning import named

# kind: peft's configuration, its names for rank, alpha and dropout (None: it has none), and further arguments.
KINDS: dict[str, tuple[str, tuple[str, str | None, str], dict[str, Any]]] = {
    "lora": ("LoraConfig", ("r", "lora_alpha", "lora_dropout"), {}),
    "rslora": ("LoraConfig", ("r", "lora_alpha", "lora_dropout"), {"use_rslora": True}),
    "dora": ("LoraConfig", ("r", "lora_alpha", "lora_dropout"), {"use_dora": True}),
    "loha": ("LoHaConfig", ("r", "alpha", "rank_dropout"), {}),
    "lokr": ("LoKrConfig", ("r", "alpha", "rank_dropout"), {}),
    "oft": ("OFTConfig", ("oft_block_size", None, "module_dropout"), {}),
    "boft": ("BOFTConfig", ("boft_block_size", None, "boft_dropout"), {}),
}

# Arguments of peft's configurations that are numbers or switches. Other arguments make peft import a module
# (`megatron_core`), read files, or change another model, and a folder from elsewhere may hold any options.
OPTIONS = (
    "rank_pattern", "alpha_pattern", "init_lora_weights", "init_weights", "bias", "lora_bias", "use_rslora", "use_dora",
    "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d", "decompose_both",
    "decompose_factor", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
    "boft_n_butterfly_factor", "fan_in_fan_out",
)  # fmt: skip

PATTERNS = ("rank_pattern", "alpha_pattern")
# Limits for the patterns of a folder: fewer than Python's cache of patterns holds, and none that takes long to match.
MOST_PATTERNS = 256
PLAIN_PATTERN = re.compile(r"[\w.\\^$-]{0,200}([*+][\w.\\^$-]{0,200})?")

UNET_ATTENTION = ("model.diffusion_model.*.attn[12].to_[qkv]", "model.diffusion_model.*.attn[12].to_out.0")
TEXT_ATTENTION = ("cond_stage_model.*.self_attn.*_proj",)


class LoRA:
    """A low-rank (or orthogonal) change of every layer whose state-dict name matches one of the patterns.

    Args:
        targets: shell patterns of layer names without `.weight` (`*` crosses dots), as a list, or as a mapping to
            their own `{rank, alpha}`; if several match a layer, the last one counts. By default all attention
            projections of the UNet (`UNET_ATTENTION`); `TEXT_ATTENTION` are those of the text encoder.
        rank: of the factors; for `oft` and `boft`, the size of the rotated blocks.
        alpha: the change is scaled by alpha / rank (`rslora`: by alpha / sqrt(rank)); by default the rank.
        kind: one of `KINDS`.
        dropout: on the input of the factors (`lora`, `dora`, `rslora`); for other kinds as peft defines it.
        seed: of the random start. One of the factors starts at zero, so an untrained LoRA changes nothing.
        options: further arguments of peft's configuration, of those in `OPTIONS`; for instance `{decompose_both: true}`
            for `lokr`.

    Raises `InputError` for an unknown kind, a pattern that matches no layer, and arguments that peft refuses.
    """

    def __init__(
        self,
        targets: Sequence[str] | Mapping[str, Mapping | None] = UNET_ATTENTION,
        rank: int = 4,
        alpha: float | None = None,
        kind: str = "lora",
        dropout: float = 0.0,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise InputError(f"LoRA: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.targets = _sizes(targets, {"rank": rank} | ({} if alpha is None else {"alpha": alpha}))
        if not 0 <= dropout < 1:
            raise InputError(f"LoRA: dropout must be at least 0 and below 1, got {dropout!r}")
        if foreign := [name for name in options or {} if name not in OPTIONS]:
            raise InputError(f"LoRA: options: unknown {short(foreign[0])}; expected some of {', '.join(OPTIONS)}")
        self.kind, self.dropout, self.seed, self.options = kind, dropout, seed, dict(options or {})
        self.name: str | None = None
        self.scaling: dict[str, float] = {}  # of each layer as trained, at strength 1

    def install(self, model: nn.Module) -> None:
        self.name = _free_name(model)
        with forked_rng(next(model.parameters()).device, self.seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's warnings are about other kinds of models
            for (rank, alpha), layers in self._match(model).items():
                self._inject(model, layers, rank, alpha)
        for _, layer in wrapped(model):
            layer.set_adapter(adapters_of(layer))  # all of them are active, not only the latest
            _keep_released_names(layer)
            if self.kind == "oft":
                from ldm.tuning.rotation import rotate_filters

                rotate_filters(layer)

    def adds(self, model: nn.Module, source: str) -> int:
        """The size of the factors of low-rank kinds; other kinds are not larger than the layers that they change."""
        for patterns in (self.targets, *(self.options.get(name) or {} for name in PATTERNS)):
            if not isinstance(patterns, Mapping) or len(patterns) > MOST_PATTERNS:
                raise InputError(f"{source}: LoRA: expected at most {MOST_PATTERNS} patterns, got {short(patterns)}")
        ranks = self._ranks(source)
        if self.kind not in ("lora", "rslora", "dora", "loha"):
            return 0
        total = 0
        for (rank, _), layers in self._match(model).items():
            for layer in layers:
                outputs, inputs = model.get_submodule(layer).weight.shape[:2]
                own = (r for pattern, r in ranks.items() if re.match(rf"(.*\.)?({pattern})$", layer))  # as peft has it
                total += next(own, rank) * (outputs + inputs)
        return total

    def _ranks(self, source: str) -> dict[str, int]:
        """`rank_pattern` of a folder. peft sets no time limit for matching patterns, so they must be simple."""
        for name in PATTERNS:
            for pattern, value in (self.options.get(name) or {}).items():
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                if not is_number or not PLAIN_PATTERN.fullmatch(pattern):
                    raise InputError(
                        f"{source}: LoRA: {name}: expected names of layers, with one * or + at most, and numbers; got "
                        f"{short(pattern)}: {short(value)}"
                    )
        return self.options.get("rank_pattern") or {}

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        own = re.compile(rf"\.(lora|hada|lokr|oft|boft)_\w+\.{self.name}(\.weight)?$")
        return named(model, lambda name: own.search(name) is not None)

    def strength(self, model: nn.Module, scale: float) -> None:
        """Multiply the trained change by `scale` from now on; for `dora`, its low-rank part.

        Raises `InputError` for rotations.
        """
        if self.kind in ("oft", "boft"):
            if scale == 1:
                return
            raise InputError(f"{self.kind} rotates the weights, and a rotation has no strength but 1; got {scale}")
        for name, layer in wrapped(model):
            if self.name in adapters_of(layer):
                as_trained = self.scaling.setdefault(name, layer.scaling[self.name])
                layer.scaling[self.name] = as_trained * scale

    def _match(self, model: nn.Module) -> dict[tuple[int, float | None], list[str]]:
        """The layers to change, grouped by rank and alpha, by their names in the model."""
        layers = dict(_layers(model))  # released name -> name in the model
        chosen: dict[str, str] = {}
        for pattern in self.targets:
            found = [name for name in layers if fnmatchcase(name, pattern)]
            if not found:
                raise InputError(
                    f"LoRA: no linear or convolution layer matches {pattern!r}; its layers have names such as "
                    f"{[*layers][len(layers) // 2]}"
                )
            chosen |= dict.fromkeys(found, pattern)
        groups: dict[tuple[int, float | None], list[str]] = {}
        for released, pattern in chosen.items():
            size = self.targets[pattern]
            groups.setdefault((size["rank"], size.get("alpha")), []).append(layers[released])
        return groups

    def _inject(self, model: nn.Module, layers: list[str], rank: int, alpha: float | None) -> None:
        import peft

        config, (rank_word, alpha_word, dropout_word), more = KINDS[self.kind]
        words = {rank_word: rank, dropout_word: self.dropout, **more, **self.options}
        if alpha_word:
            words[alpha_word] = rank if alpha is None else alpha
        try:
            peft.inject_adapter_in_model(getattr(peft, config)(target_modules=layers, **words), model, self.name)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"LoRA ({self.kind}, rank {rank}): peft refuses: {' '.join(str(error).split())}") from None
        finally:
            vars(model).pop("peft_config", None)  # the layers do not need it


def _sizes(
    targets: str | Sequence[str] | Mapping[str, Mapping | None], given: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """`{rank, alpha}` of each pattern: its own values, or those given for all. Raises `InputError`."""
    targets = [targets] if isinstance(targets, str) else targets
    own = targets if isinstance(targets, Mapping) else dict.fromkeys(targets)
    if unknown := {key for chosen in own.values() for key in chosen or {}} - {"rank", "alpha"}:
        raise InputError(f"LoRA: targets know rank and alpha, not {', '.join(sorted(unknown))}")
    sizes = {pattern: {**given, **(chosen or {})} for pattern, chosen in own.items()}
    for pattern, size in sizes.items():
        _check_size(pattern, **size)
    return sizes


def _check_size(pattern: str, rank: Any, alpha: Any = 1) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise InputError(f"LoRA: rank of {pattern!r} must be at least 1, got {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise InputError(f"LoRA: alpha of {pattern!r} must be a finite number, got {alpha!r}")


def wrapped(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that peft has wrapped, by their names in the model. Of two around one layer, the outer comes first."""
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and hasattr(module, "base_layer"):
            yield name, module


def adapters_of(layer: nn.Module) -> list[str]:
    """The names of the changes of a wrapped layer, in the order of installation."""
    return list(dict.fromkeys(key for part in layer.adapter_layer_names for key in getattr(layer, part, {})))


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Fold every change into its weights. The model is then plain again, as before `install`."""
    for name, layer in list(wrapped(model))[::-1]:  # inner ones first
        parent, _, child = name.rpartition(".")
        layer.merge(safe_merge=True)
        setattr(model.get_submodule(parent), child, layer.base_layer)


def _layers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(released name, name in the model) of every linear and convolution layer, wrapped or not."""
    released = {id(value): name.removesuffix(".weight") for name, value in model.state_dict(keep_vars=True).items()}
    inside: tuple[str, ...] = ()  # prefixes of wrapped layers
    for name, module in model.named_modules():
        is_wrapped = hasattr(module, "base_layer")
        if (is_wrapped or isinstance(module, (nn.Linear, nn.Conv2d))) and not name.startswith(inside or "\0"):
            inside += (name + ".",) if is_wrapped else ()
            yield released[id(module.weight)], name


def _free_name(model: nn.Module) -> str:
    """`default`, or `default_1`, ... if that name is taken."""
    taken = {name for _, layer in wrapped(model) for name in adapters_of(layer)}
    return next(name for i in range(len(taken) + 1) if (name := f"default_{i}" if i else "default") not in taken)


# --- names: peft moves `to_q.weight` to `to_q.base_layer.weight`; state dicts keep the released names


def _keep_released_names(layer: nn.Module) -> None:
    if _hide_base_layer not in layer._state_dict_hooks.values():
        layer._register_state_dict_hook(_hide_base_layer)
        layer._register_load_state_dict_pre_hook(_find_base_layer, with_module=True)


def _hide_base_layer(_layer: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    inner = prefix + "base_layer."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name.removeprefix(inner)] = state.pop(name)


def _find_base_layer(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    own = {*layer._modules, *layer._parameters}
    for name in [name for name in state if name.startswith(prefix)]:
        rest = name.removeprefix(prefix)
        if rest.partition(".")[0] not in own:
            state[f"{prefix}base_layer.{rest}"] = state.pop(name)
