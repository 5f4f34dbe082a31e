"""Several trainings over one base: each has its own adapters, which see only its own share of the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ldm.modules.adapters import FORMS, tapped_blocks


class Shares(nn.Module):
    """One form for each training that has one here; the batch is cut into `count` equal shares, in their order."""

    def __init__(self, forms: Mapping[int, nn.Module], count: int) -> None:
        super().__init__()
        self.forms = nn.ModuleDict({str(number): form for number, form in forms.items()})
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        shares = x.chunk(self.count)
        made = {int(number): form(shares[int(number)]) for number, form in self.forms.items()}
        nothing = torch.zeros_like(next(iter(made.values())))
        return torch.cat([made.get(number, nothing) for number in range(self.count)])


def attach_shares(
    model: nn.Module, configs: Sequence[Mapping[str, list[dict]]], seeds: Sequence[int]
) -> list[dict[str, str]]:
    """Attach the adapters of several trainings; `configs` are as `read_adapter_config` gives them.

    Trainings with the same route and scale share a place in the block. Each starts from its seed as it would alone.
    Returns for each training a mapping from the names of its parameters here to the names that they would have alone.
    """
    groups: dict[
        tuple, dict[int, tuple[dict, int]]
    ] = {}  # (kind, route, scale, which of the same) -> training -> entry
    for number, config in enumerate(configs):
        for kind, entries in config.items():
            same: dict[tuple, int] = {}
            for place, entry in enumerate(entries):
                route = (kind, entry["din"], entry["dout"], entry["scale"])
                same[route] = same.get(route, -1) + 1
                groups.setdefault((*route, same[route]), {})[number] = (entry, place)
    names: list[dict[str, str]] = [{} for _ in configs]
    forms_of: list[list[tuple[int, int, nn.Module]]] = [[] for _ in configs]
    order = {prefix: number for number, (prefix, _) in enumerate(tapped_blocks(model))}
    for (kind, reads, writes, scale, _), entries in groups.items():
        for prefix, block in tapped_blocks(model, kind):
            width = block.width(reads), block.width(writes)
            forms = {n: FORMS[kind](*width, e["mid_dim"], e["method"], e["init"]) for n, (e, _) in entries.items()}
            name = block.next_adapter_name()
            block.attach(name, Shares(forms, len(configs)), reads, writes, scale)
            for number, (_, place) in entries.items():
                forms_of[number].append((order[prefix], place, forms[number]))
                alone = block.adapter_name(place)
                for parameter, _ in forms[number].named_parameters():
                    here = f"{prefix}.{name}.forms.{number}.{parameter}"
                    names[number][here] = f"{prefix}.{alone}.{parameter}"
    with torch.random.fork_rng(devices=[]):
        for seed, placed in zip(seeds, forms_of, strict=True):
            torch.manual_seed(seed)
            for _, _, form in sorted(placed, key=lambda one: one[:2]):
                form.reset_parameters()
    return names
