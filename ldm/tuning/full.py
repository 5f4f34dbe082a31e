"""Full fine-tuning, the baseline of the other families, and fine-tuning of some base weights by name."""

from __future__ import annotations

from torch import nn

from ldm.errors import InputError
from ldm.patterns import Patterns
from ldm.tuning import named


class ByName:
    """The base weights whose state-dict name has a match of a regular expression.

    Raises `InputError` for a pattern that cannot be read and, on `install`, for one that matches nothing.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        Patterns("pattern").search(pattern, "")

    def install(self, model: nn.Module) -> None:
        if not self.trainable(model):
            raise InputError(f"no weight of this model has a name that matches {self.pattern!r}")

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        patterns = Patterns("pattern")
        return named(model, lambda name: patterns.search(self.pattern, name) and model.tuning.is_base(name))


class UNet:
    """Every weight of the UNet."""

    def install(self, model: nn.Module) -> None:
        pass

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        return named(model, lambda name: name.startswith("model.") and model.tuning.is_base(name))


class ConditionStage(ByName):
    """Every weight of the text encoder (or whatever encodes the condition)."""

    def __init__(self) -> None:
        super().__init__(r"^(cond_stage_model|conditioner)\.")

    def install(self, model: nn.Module) -> None:
        pass  # an encoder may have no parameters
