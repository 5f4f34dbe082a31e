"""Several tunings of one base that answer in one call: each sees its own share of the batch.

A *view* of a model has modules of its own and shares every tensor with it, so that each tuning is installed on a view
as if it were alone. `joined` makes one more view that answers for all of them: wherever their modules are still those
of the base they are called once for the whole batch, and wherever a tuning changed something each share of the batch
goes its own way. That holds for any family, since the views are compared and nothing is known of families.
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

# Within its context random numbers on a device are those of one training.
Drawing = Callable[[torch.device], AbstractContextManager]


def view(model: nn.Module) -> nn.Module:
    """A model with modules of its own that shares every parameter and buffer with `model`."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def own_copies(model: nn.Module, names: Iterable[str]) -> None:
    """Give a view its own copies of the named parameters, which it is about to change."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    copies = {id(parameters[name]): nn.Parameter(parameters[name].detach().clone()) for name in names}
    for module in model.modules():
        for name, value in module._parameters.items():
            if id(value) in copies:
                module._parameters[name] = copies[id(value)]


class SplitBatch(nn.Module):
    """One module for each training; the batch is cut into as many equal parts, in their order.

    Every tensor that the modules are called with has the batch as its first dimension. None stands for a training that
    has no module here: its part of the answer is zero.
    """

    def __init__(self, parts: Sequence[nn.Module | None]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({str(number): part for number, part in enumerate(parts) if part is not None})
        self.count = len(parts)
        self.drawing: Sequence[Drawing] | None = None  # of each training, where modules draw random numbers
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
    """Whether a module may draw random numbers in training: it drops something out."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 or hasattr(m, "rank_dropout") for m in module.modules())


def _share(value: Any, number: int, count: int) -> Any:
    """The part of (nested) arguments that is of one training."""
    if isinstance(value, Tensor):
        return value.chunk(count)[number]
    if isinstance(value, dict):
        return {key: _share(one, number, count) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_share(one, number, count) for one in value)
    return value


def join(base: nn.Module, tuned: Sequence[nn.Module]) -> None:
    """Let `base`, a fresh view, answer for all of `tuned`, views of the same model. They stay as they are."""
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
    """Whether a module is still that of the base, but for what lies below it."""
    own, theirs = ([id(t) for t in (*one._parameters.values(), *one._buffers.values())] for one in (base, other))
    adapters = {route.name for route in other.routes} if isinstance(other, TappedBlock) else set()
    children = [name for name in other._modules if name not in adapters]
    return type(base) is type(other) and own == theirs and children == [*base._modules]


def _join_adapters(base: TappedBlock, tuned: Sequence[TappedBlock]) -> None:
    """Attach the position adapters of all trainings; those with the same route and scale share a place."""
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
