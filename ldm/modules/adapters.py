"""The forms of an adapter (any module can be one) and the YAML that attaches them to the blocks of a UNet."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import plain
from ldm.devices import forked_rng
from ldm.errors import InputError, did_you_mean, short
from ldm.modules.taps import TappedBlock

# `method` in the YAML. The published code calls ReLU `default`.
ACTIVATIONS = {"relu": F.relu, "sig": F.sigmoid, "silu": F.silu, "ident": lambda x: x, "default": F.relu}
STARTS = ("zero", "default")


class Activation(nn.Module):
    """A named activation without parameters."""

    def __init__(self, method: str) -> None:
        super().__init__()
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.method](x)


def start(layers: nn.Sequential, init: str) -> None:
    """The initialisation: torch's own; with `init="zero"`, zeros in the last layer.

    Then the untrained adapter changes nothing. `init="default"` is the random start of the published code.
    """
    for layer in layers:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    if init == "zero":
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)


def in_own_dtype(function: Callable[[Tensor], Tensor], x: Tensor, like: Tensor) -> Tensor:
    """`function(x)` in the dtype of its weights, so fp32 adapters can be trained on a base in half precision."""
    return function(x.to(like.dtype)).to(x.dtype)


class BottleneckMLP(nn.Module):
    """Down-projection, activation, up-projection: [b, n, dim_in] to [b, n, dim_out] (arXiv 2303.18181, section 3.2)."""

    dims = 3  # dimensions of the values
    layers = ("adp.0", "adp.2")  # names of the two projections

    def __init__(self, dim_in: int, dim_out: int, mid_dim: int, method: str = "default", init: str = "zero") -> None:
        super().__init__()
        self.adp = nn.Sequential(nn.Linear(dim_in, mid_dim), Activation(method), nn.Linear(mid_dim, dim_out))
        self.config = {"mid_dim": mid_dim, "method": method, "init": init}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start(self.adp, self.config["init"])

    def forward(self, x: Tensor) -> Tensor:
        return in_own_dtype(self.adp, x, like=self.adp[0].weight)


class BottleneckConv(nn.Sequential):
    """Group norm, SiLU, 3x3 convolution, activation, 3x3 convolution: [b, dim_in, h, w] to [b, dim_out, h, w]."""

    dims = 4
    layers = ("2", "4")  # names of the two convolutions

    def __init__(self, dim_in: int, dim_out: int, mid_dim: int, method: str = "default", init: str = "zero") -> None:
        super().__init__(
            nn.GroupNorm(32, dim_in),
            nn.SiLU(),
            nn.Conv2d(dim_in, mid_dim, 3, padding=1),
            Activation(method),
            nn.Conv2d(mid_dim, dim_out, 3, padding=1),
        )
        self.config = {"mid_dim": mid_dim, "method": method, "init": init}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start(self, self.config["init"])

    def forward(self, x: Tensor) -> Tensor:
        return in_own_dtype(super().forward, x, like=self[2].weight)


# The values of `form` in the YAML.
FORMS: dict[str, type[nn.Module]] = {"mlp": BottleneckMLP, "conv": BottleneckConv}


class Kind(NamedTuple):
    """The blocks that a key of `adapter_config` means: class, default form, dimensions of their values."""

    block: str
    form: str
    dims: int


BLOCK_KINDS = {
    "transformer_adp_config": Kind("BasicTransformerBlock", form="mlp", dims=3),
    "resblock_adp_config": Kind("ResBlock", form="conv", dims=4),
}
# The keys of an entry and their defaults. None: required; for `form`: the default form of the kind.
ENTRY = {
    "type": "inout", "din": None, "dout": None, "mid_dim": None, "method": "default", "scale": 1.0, "init": "zero",
    "form": None,
}  # fmt: skip


def new_form(entry: Mapping, dim_in: int, dim_out: int) -> nn.Module:
    """The form that a checked entry names, from values of width `dim_in` to values of width `dim_out`."""
    return FORMS[entry["form"]](dim_in, dim_out, entry["mid_dim"], entry["method"], entry["init"])


def tapped_blocks(model: nn.Module, kind: str | None = None) -> Iterator[tuple[str, TappedBlock]]:
    """The blocks of a model that adapters can be attached to, by name; of one of `BLOCK_KINDS` if given."""
    for name, module in model.named_modules():
        if isinstance(module, TappedBlock) and (kind is None or type(module).__name__ == BLOCK_KINDS[kind].block):
            yield name, module


def attach_adapters(model: nn.Module, adapter_config: Mapping | None) -> list[str]:
    """Attach every adapter of an `adapter_config` to every block of its kind. Returns the names of the new modules.

    `{"transformer_adp_config": [entry, ...], "resblock_adp_config": entry or [entry, ...]}` with entries
    `{type: inout, din, dout, mid_dim, method, scale, init}`. Raises `InputError` naming the key that is wrong.
    """
    entries = [(kind, entry) for kind, own in read_adapter_config(adapter_config).items() for entry in own]
    with forked_rng():  # later random numbers do not depend on the adapters
        state = torch.get_rng_state()
        attached = [name for kind, entry in entries for name in attach_one(model, kind, entry)]
        torch.set_rng_state(state)
        for name, module in model.named_modules():  # block by block, for any number of adapters
            if name in attached:
                module.reset_parameters()
    return attached


def attach_one(model: nn.Module, kind: str, entry: Mapping) -> list[str]:
    """Attach one checked entry to every block of its kind. Returns the names of the new modules."""
    names = []
    for prefix, block in tapped_blocks(model, kind):
        name = block.next_adapter_name()
        block.check_route(entry["din"], entry["dout"])
        form = new_form(entry, block.width(entry["din"]), block.width(entry["dout"]))
        block.attach(name, form, entry["din"], entry["dout"], entry["scale"])
        names.append(f"{prefix}.{name}")
    if not names:
        raise InputError(f"{kind}: this model has no {BLOCK_KINDS[kind].block} to attach an adapter to")
    return names


def read_adapter_config(config: Mapping | None) -> dict[str, list[dict]]:
    """A checked, completed copy of an `adapter_config`: a list of full entries for each kind that it names."""
    config = plain(config) or {}
    if not isinstance(config, Mapping):
        raise InputError(f"adapter_config must be a mapping with {' and/or '.join(BLOCK_KINDS)}, got {short(config)}")
    for kind in config:
        if kind not in BLOCK_KINDS:
            raise InputError(f"adapter_config has the unknown key {kind!r}{did_you_mean(kind, BLOCK_KINDS)}")
    return {
        kind: [check_entry(kind, e) for e in (entries if isinstance(entries, list) else [entries])]
        for kind, entries in config.items()
        if entries is not None
    }


def check_entry(kind: str, entry: Any) -> dict:
    """A completed copy of one entry. Raises `InputError` naming the key that is wrong."""
    if not isinstance(entry, Mapping):
        raise InputError(f"{kind}: expected entries with {', '.join(ENTRY)}, got {short(entry)}")
    for key in entry:
        if key not in ENTRY:
            raise InputError(f"{kind} has the unknown key {key!r}{did_you_mean(key, ENTRY)}")
    entry = {**ENTRY, "form": BLOCK_KINDS[kind].form, **entry}
    fitting = [name for name, form in FORMS.items() if form.dims == BLOCK_KINDS[kind].dims]
    if entry["form"] not in fitting:
        raise InputError(f"{kind}: form must be one of {', '.join(fitting)}, got {short(entry['form'])}")
    for key in ("din", "dout", "mid_dim"):
        if entry[key] is None:
            raise InputError(f"{kind} lacks the key {key!r}")
    for key, (fits, expected) in RULES.items():
        if not fits(entry[key]):
            raise InputError(f"{kind}: {key} must be {expected}, got {entry[key]!r}")
    return {**entry, "scale": float(entry["scale"])}


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _one_of(names: Collection[str]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, str) and value in names, f"one of {', '.join(names)}"


# The checks of the values of an entry, and their names in messages.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "din": (_is_name, "a name"),
    "dout": (_is_name, "a name"),
    "type": (lambda value: value == "inout", "'inout'"),
    "method": _one_of(ACTIVATIONS),
    "init": _one_of(STARTS),
    "mid_dim": (lambda value: _is_number(value, int) and value >= 1, "a whole number of at least 1"),
    "scale": (lambda value: _is_number(value, (int, float)) and math.isfinite(value), "a finite number"),
}
