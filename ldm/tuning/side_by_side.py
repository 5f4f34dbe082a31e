"""Several tunings of one base in one call of the model: each gets its own part of the batch.

A *view* of a model has its own modules and shares every tensor with the model, so each tuning can be installed on a
view as if it were alone. `join` turns one more view into a model of all tunings. A module that no tuning has changed is
called once for the whole batch. Where a tuning has changed a module, each part of the batch goes through its own
module. This works for any family, because `join` compares the views and knows nothing about families.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.taps import TappedBlock

# A context in which random numbers on a device come from one training's generator.
Drawing = Callable[[torch.device], AbstractContextManager]


def view(model: nn.Module) -> nn.Module:
    """A model with modules of its own that shares every parameter and buffer with `model`."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def own_copies(model: nn.Module, names: Iterable[str]) -> None:
    """Give a view its own copies of the named parameters, because its tuning will change them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    copies = {id(parameters[name]): nn.Parameter(parameters[name].detach().clone()) for name in names}
    for module in model.modules():
        for name, value in module._parameters.items():
            if id(value) in copies:
                module._parameters[name] = copies[id(value)]


class SplitBatch(nn.Module):
    """One module for each training; the batch is cut into as many equal parts, in their order.

    Every tensor argument has the batch as its first dimension. None stands for a training without a module here: its
    part of the output is zero.
    """

    def __init__(self, parts: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({str(number): part for number, part in enumerate(parts) if part is not None})
        self.count = len(parts)
        self.drawing: Sequence[Drawing] | None = None  # of each training, if modules draw random numbers
        self.draws = any(map(_draws, self.parts.values()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answers = {}
        for number, part in ((int(number), part) for number, part in self.parts.items()):
            own, named = _share((args, kwargs), number, self.count)
            drawn = self.training and self.draws and self.drawing is not None
            with self.drawing[number](args[0].device) if drawn else nullcontext():
                answers[number] = part(*own, **named)
        nothing = torch.zeros_like(next(iter(answers.values())))
        return torch.cat([answers.get(number, nothing) for number in range(self.count)])


def _draws(module: nn.Module) -> bool:
    """Whether a module may draw random numbers in training, i.e. has dropout."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 or hasattr(m, "rank_dropout") for m in module.modules())


def _share(value: Any, number: int, count: int) -> Any:
    """The part of (nested) arguments that belongs to one training."""
    if isinstance(value, Tensor):
        return value.chunk(count)[number]
    if isinstance(value, dict):
        return {key: _share(one, number, count) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_share(one, number, count) for one in value)
    return value


def join(base: nn.Module, tuned: Sequence[nn.Module]) -> None:
    """Turn `base`, a fresh view, into a model of all of `tuned`, views of the same model, which do not change."""
    children = list(base.named_children())
    if isinstance(base, TappedBlock):
        _join_adapters(base, tuned)
    for name, child in children:
        others = [getattr(one, name) for one in tuned]
        if all(_alike(child, other) for other in others):
            join(child, others)
        else:
            setattr(base, name, SplitBatch(others))


def _alike(base: nn.Module, other: nn.Module) -> bool:
    """Whether a module itself is that of the base; its child modules may differ."""
    own, theirs = ([id(t) for t in (*one._parameters.values(), *one._buffers.values())] for one in (base, other))
    adapters = {route.name for route in other.routes} if isinstance(other, TappedBlock) else set()
    children = [name for name in other._modules if name not in adapters]
    return type(base) is type(other) and own == theirs and children == [*base._modules]


def _join_adapters(base: TappedBlock, tuned: Sequence[TappedBlock]) -> None:
    """Attach the position adapters of all trainings. Adapters with the same route and scale share one `SplitBatch`."""
    places: dict[tuple, dict[int, nn.Module]] = {}  # (reads, writes, scale, which of the same) -> training -> form
    for number, block in enumerate(tuned):
        same: dict[tuple, int] = {}
        for route in block.routes:
            key = (route.reads, route.writes, route.scale)
            same[key] = same.get(key, -1) + 1
            places.setdefault((*key, same[key]), {})[number] = getattr(block, route.name)
    for (reads, writes, scale, _), forms in places.items():
        split = SplitBatch([forms.get(number) for number in range(len(tuned))])
        base.attach(base.next_adapter_name(), split, reads, writes, scale)
