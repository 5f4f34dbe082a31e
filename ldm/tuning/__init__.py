"""Floor 2: which parameters are trained.

A family of parameter-efficient tuning is one file here and a row of `ldm.tuning.table`. YAML chooses it by name,
`family: lora`, or by its dotted `target`; a user's own family has a target. A family has two methods. `install(model)`
attaches what it needs. `trainable(model)` names the trainable parameters: they alone get gradients, go into the
optimizer, are saved, loaded and counted.

An entry of `tuning:` is `{family or target, params, learning_rate, steps}`. The last two are optional and mean the same
for every family: its own learning rate, and `[first, end]`, the steps in which it is trained (end excluded, null: no
end).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from ldm import schema
from ldm.checkpoints import fingerprint
from ldm.config import get_obj_from_str, instantiate_from_config, plain
from ldm.errors import InputError, short
from ldm.tuning import table

UNET = "model.diffusion_model."  # prefix of the names of its weights

# `train_level` of the published YAML files, as shorthand.
LEVELS = {"adapter": "position", "unet": "unet", "embeder": "text-encoder"}


class Family(Protocol):
    """One way of tuning a latent diffusion model.

    Optional methods:
    `adds(model, source)`: the least number of parameters that `install` will add, so that a folder cannot claim more
    memory than it holds; `strength(model, scale)`: multiplies the effect of the training by `scale`;
    `after_step(model, rate)`: called after each optimizer step in which it is trained, with its learning rate;
    `in_folder(model)`: the part of `trainable(model)` that folders hold, by default all of it;
    `finish(model, run)`: called at the end of a training with the folder of the run.
    """

    def install(self, model: nn.Module) -> None:
        """Attach what the family needs to the model, which has its base weights."""

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The trainable parameters by state-dict name. Parameters that the family adds exist only after `install`."""


@dataclass
class Chosen:
    """A family and the entry of `tuning:` that chose it."""

    family: Family
    target: str
    params: dict[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None  # None: the model's
    steps: tuple[int, int | None] = (0, None)
    weight_decay: float | None = None  # None: the optimizer's
    rate_from: tuple[int, float] | None = None  # (step, learning rate from that step on)
    learns: bool = True  # False: it is installed but not trained

    @property
    def group(self) -> dict[str, Any]:
        """The options of its optimizer groups other than the learning rate."""
        own = {"weight_decay": self.weight_decay, "rate_from": self.rate_from}
        return {name: value for name, value in own.items() if value is not None}

    def learns_at(self, step: int) -> bool:
        """Whether the family is trained in a step, counted from 0."""
        first, end = self.steps
        return first <= step and (end is None or step < end)


def families(
    train_level: str | Sequence[str] | None,
    tuning: Mapping | Sequence[Mapping] | None,
    adapter_config: Mapping | None = None,
) -> list[Chosen]:
    """The families that a config names by `tuning: [{target, ...}, ...]` and/or by the shorthand `train_level`.

    `adapter_config` is that of the UNet. Its position adapters are trained at the levels `adapter` and `unet`; at other
    levels they are attached but not trained.

    Raises `InputError` for a malformed entry, and for a class that is not a family before it is called.
    """
    levels = [train_level] if isinstance(train_level, str) else list(train_level or [])
    asked_for = "adapter" in levels
    for level in levels:
        if level not in LEVELS:
            raise InputError(f"train_level has {level!r}: expected {', '.join(LEVELS)}, or tuning: [{{target: ...}}]")
    tuning = plain(tuning)
    entries = [tuning] if isinstance(tuning, Mapping) else list(tuning or [])
    if adapter_config and "adapter" not in levels:
        levels = ["adapter", *levels]
    chosen = [choose({"family": LEVELS[level]}) for level in levels]
    if adapter_config:
        position = chosen[levels.index("adapter")]
        position.family.adapter_config = adapter_config
        position.learns = asked_for or "unet" in levels
    return chosen + [choose(entry) for entry in entries]


def choose(entry: Any) -> Chosen:
    """The family of one entry of `tuning:` in the user's own config, so its `target` is imported.

    Raises `InputError`.
    """
    if not isinstance(entry, Mapping) or ("family" in entry) == isinstance(entry.get("target"), str):
        raise InputError(
            f"tuning: expected entries with family or target, params, learning_rate, steps, got {short(entry)}"
        )
    target = table.named(entry["family"]) if "family" in entry else entry["target"]
    schema.check_part(schema.Tuning, entry, "tuning")
    kind = get_obj_from_str(target)
    if not (hasattr(kind, "install") and hasattr(kind, "trainable")):
        raise InputError(f"tuning: {short(target)} is not a family: it needs install(model) and trainable(model)")
    params = entry.get("params") or {}
    return Chosen(
        instantiate_from_config({"target": target, "params": params}), target, dict(params),
        entry.get("learning_rate"), _steps(entry, target),
        weight_decay=entry.get("weight_decay"), rate_from=_rate_from(entry, target),
    )  # fmt: skip


def _steps(entry: Mapping[str, Any], target: str) -> tuple[int, int | None]:
    match tuple(entry.get("steps") or (0, None)):
        case (int(first), None):
            return first, None
        case (int(first), int(end)) if first < end:
            return first, end
        case steps:
            raise InputError(f"tuning: steps of {target} must be [first, end] or [first, null], got {short(steps)}")


def _rate_from(entry: Mapping[str, Any], target: str) -> tuple[int, float] | None:
    match entry.get("rate_from"):
        case None:
            return None
        case [step, rate] if step == int(step) > 0 < rate and entry.get("learning_rate") is not None:
            return int(step), float(rate)
        case later:
            raise InputError(
                f"tuning: rate_from of {target} must be [step, learning rate], beside learning_rate, got {short(later)}"
            )


class Tuning:
    """The families that tune one model, in order, and a record of the base model.

    `base`: the state-dict names before any family was installed. `released`: the released values of base weights that
    files have changed since. `fingerprint`: the digest of the UNet's base weights that stay frozen.
    """

    def __init__(self, model: nn.Module, chosen: Iterable[Chosen] = ()) -> None:
        self.model, self.families = model, list(chosen)
        self.base: frozenset[str] | None = None
        self.released: dict[str, Tensor] = {}
        self.fingerprint: str | None = None

    def install(self) -> None:
        """Install the families; the model must have its base weights."""
        before = self.model.state_dict()
        self.base = frozenset(before)
        for one in self.families:
            one.family.install(self.model)
        self.fingerprint = unet_fingerprint(before, changed=self.parameters())

    def is_base(self, name: str) -> bool:
        """Whether a state-dict name belongs to the base; tuning has added the others."""
        return self.base is None or name in self.base

    def by_family(self) -> list[tuple[Chosen, dict[str, nn.Parameter]]]:
        """The families with their trainable parameters by state-dict name; a shared one belongs to the first family."""
        taken: set[str] = set()
        result = []
        for one in self.families:
            own = one.family.trainable(self.model) if one.learns else {}
            result.append((one, {name: value for name, value in own.items() if name not in taken}))
            taken |= own.keys()
        return result

    def parameters(self, of: Callable[[Chosen], bool] = lambda one: True) -> dict[str, nn.Parameter]:
        """The trainable parameters of all families, or of some, by state-dict name."""
        return {name: value for one, own in self.by_family() if of(one) for name, value in own.items()}

    def remember(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """Keep the released values of base weights before the first file changes them. Returns all kept values."""
        own = self.model.state_dict(keep_vars=True)
        for name in names:
            if name in own and self.is_base(name):
                self.released.setdefault(name, own[name].data)
        return self.released


def unet_fingerprint(state: Mapping[str, Tensor], changed: Container[str] = ()) -> str | None:
    """A digest of the weights of a model's UNet that are not `changed`; None if all are."""
    frozen = {n.removeprefix(UNET): v for n, v in state.items() if n.startswith(UNET) and n not in changed}
    return fingerprint(frozen) if frozen else None


def freeze_rest(model: nn.Module, learning: Mapping[str, nn.Parameter]) -> None:
    """Turn gradients on for the given parameters and off for all others."""
    model.requires_grad_(False)
    for parameter in learning.values():
        parameter.requires_grad_(True)


def named(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """The parameters whose state-dict name is wanted. A parameter with several names appears under the first."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, nn.Parameter) and wanted(name):
            found.setdefault(id(value), (name, value))
    return dict(found.values())
