"""Routes of adapters through a block (arXiv 2303.18181): where they read, where they write, and their scale.

A block passes the values on its data path through `tap(position, value)`, which names them. Attached adapters read and
write there. The block itself does not know the adapters; without any, its graph is that of the plain block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, SupportsFloat

from torch import Tensor, nn

from ldm.errors import InputError

Tap = Callable[[str, Tensor], Tensor]


class Route(NamedTuple):
    """One adapter's route through a block: `scale * form(value at reads)` is added to the value at `writes`.

    The scale is a number, or an object with `scale * tensor` and `float(scale)`, for a learnt scale.
    """

    name: str  # attribute of the block that holds the form
    reads: str
    writes: str
    scale: SupportsFloat


def untouched(position: str, value: Tensor) -> Tensor:
    """The tap of a block without adapters."""
    return value


class TappedBlock(nn.Module):
    """A block whose `forward` names its values with `tap = self.taps()`.

    Subclasses list their positions in the order of the data path, with the stream that each lies on, and which of them
    may be written to (writing to the output of a branch would be the same as writing to the input of the next one).
    """

    positions: ClassVar[dict[str, str]]  # position -> stream
    writable: ClassVar[tuple[str, ...]]
    first_adapter: ClassVar[str]  # state-dict name of the first adapter; later ones get _1, _2, ...

    def __init__(self) -> None:
        super().__init__()
        self.routes: tuple[Route, ...] = ()
        self.adapters_enabled = True

    def attach(self, name: str, form: nn.Module, reads: str, writes: str, scale: float = 1.0) -> None:
        """Attach `form` as the attribute `name`. It maps the value at `reads` to the shape of the value at `writes`.

        Raises `InputError` if the route is not one of this block's or the name is taken.
        """
        self.check_route(reads, writes)
        if hasattr(self, name):
            raise InputError(
                f"adapter name {name!r} is taken in this {type(self).__name__}; detach it first or use another"
            )
        self.add_module(name, form)
        self.routes = (*self.routes, Route(name, reads, writes, float(scale)))

    def detach(self, name: str) -> None:
        """Remove the adapter `name` and its route."""
        delattr(self, name)
        self.routes = tuple(route for route in self.routes if route.name != name)

    @classmethod
    def adapter_name(cls, number: int) -> str:
        """The state-dict name of a block's adapter by its number: `adapter_inout`, `adapter_inout_1`, ..."""
        return cls.first_adapter + (f"_{number}" if number else "")

    def next_adapter_name(self) -> str:
        """The state-dict name for one more adapter."""
        taken = {route.name for route in self.routes}
        return next(name for name in map(self.adapter_name, range(len(taken) + 1)) if name not in taken)

    def width(self, position: str) -> int:
        """The number of channels of the value at a position."""
        raise NotImplementedError

    def valid_outputs(self, reads: str) -> list[str]:
        """The positions that an adapter reading at `reads` may write to: at or after it, on the same stream."""
        order = list(self.positions)
        after = order[order.index(reads) :]
        return [p for p in after if p in self.writable and self.positions[p] == self.positions[reads]]

    def check_route(self, reads: str, writes: str) -> None:
        """Raises `InputError` for a route that this kind of block does not have; the message names valid routes."""
        route = f"adapter route {reads}-{writes}"
        if reads not in self.positions:
            raise InputError(f"{route}: unknown input {reads!r}, expected one of {', '.join(self.positions)}")
        valid = f"from {reads} one can write to {', '.join(self.valid_outputs(reads)) or 'nothing'}"
        if writes not in self.writable:
            raise InputError(f"{route}: unknown output {writes!r}; {valid}")
        if self.positions[reads] != self.positions[writes]:
            raise InputError(
                f"{route} joins different streams: {reads} lies on the {self.positions[reads]}, "
                f"{writes} on the {self.positions[writes]}; {valid}"
            )
        if writes not in self.valid_outputs(reads):
            raise InputError(f"{route} writes before it reads: {writes} comes before {reads} in the block; {valid}")

    def taps(self) -> Tap:
        """The tap for one call of `forward`. It holds the contributions of adapters, so the block stays re-entrant."""
        if not (self.routes and self.adapters_enabled):
            return untouched
        owed: dict[str, Tensor] = {}

        def tap(position: str, value: Tensor) -> Tensor:
            for route in self.routes:
                if route.reads == position:
                    due = route.scale * getattr(self, route.name)(value)
                    owed[route.writes] = owed[route.writes] + due if route.writes in owed else due
            return value + owed[position] if position in owed else value

        return tap
