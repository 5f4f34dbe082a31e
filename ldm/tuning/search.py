"""Finds routes in one training instead of a sweep: every route gets a narrow adapter and a learnt gate.

In each block, `gate * form(value at reads)` is added to the value at `writes` for every route. The gates are a softmax
over the routes, as in DARTS (arXiv 1806.09055, eq. 2). The softmax becomes sharper from step to step, and a penalty on
its entropy speeds that up. At the end, the routes with the largest gates are written as configs, ready to train.
"""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoints import save_json, save_text
from ldm.devices import forked_rng
from ldm.errors import InputError, did_you_mean
from ldm.modules.adapters import BLOCK_KINDS, attach_one, check_entry, tapped_blocks
from ldm.modules.taps import Route, TappedBlock
from ldm.tuning import UNET, named

log = logging.getLogger(__name__)

GATES = "route_gates"  # name of the module in the model
SHARED = ("all", "width")


class RouteGates(nn.Module):
    """Gates [groups, routes] = keep * softmax(speed * logits), so the gates of each group of blocks sum to `keep`.

    `speed`: how much faster the gates are trained than the adapters, since an optimizer such as AdamW moves every
    parameter by about its learning rate.
    """

    def __init__(self, groups: int, routes: int, keep: int, speed: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(groups, routes))
        self.keep, self.speed = keep, speed

    def forward(self) -> Tensor:
        return self.keep * (self.speed * self.logits).softmax(-1)

    @torch.no_grad()
    def sharpen(self, rate: float, sparsity: float, growth: float) -> None:
        """A step down the entropy H = -sum g log g of each group, decoupled from the loss; then logits * `growth`.

        The multiplication equals a temperature that falls by `growth`.
        """
        probabilities = (self.speed * self.logits).softmax(-1)
        logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
        entropy = -(probabilities * logs).sum(-1, keepdim=True)
        self.logits += rate * sparsity * probabilities * (logs + entropy)
        self.logits *= growth


class Gate:
    """One gate as the scale of a route: it multiplies the output of the adapter."""

    def __init__(self, gates: RouteGates, group: int, number: int) -> None:
        self.gates, self.group, self.number = gates, group, number

    def __mul__(self, value: Tensor) -> Tensor:
        return self.gates()[self.group, self.number] * value

    def __float__(self) -> float:
        return self.gates()[self.group, self.number].item()


class RouteSearch:
    """Narrow adapters on many routes at once, with a learnt gate for each.

    Args:
        routes: names `<input>-<output>`, or `all`: every route of transformer blocks (17) and residual blocks (3).
        mid_dim: width of each adapter while searching.
        found_mid_dim: width in the configs that are written at the end.
        keep: how many routes to find; the gates of a block sum to it.
        shared: `all`: one gate per route for the whole UNet; `width`: one gate per route and width of blocks, so that
            levels of the UNet may differ.
            steps: the number of steps in which the gates become sharp; usually the length of the training.
            sharpening: the factor by which their logits grow over these steps.
        sparsity: weight of the penalty on the entropy of the gates.
        gate_speed: how many times faster the gates are trained than the adapters.

    Folders hold the adapters with the gates as constant scales, so they load as position adapters.
    """

    def __init__(
        self,
        routes: str | Iterable[str] = "all",
        mid_dim: int = 4,
        found_mid_dim: int = 24,
        keep: int = 1,
        shared: str = "all",
        steps: int = 800,
        sharpening: float = 10.0,
        sparsity: float = 0.1,
        gate_speed: float = 10.0,
    ) -> None:
        if shared not in SHARED:
            raise InputError(f"RouteSearch: shared must be one of {', '.join(SHARED)}, got {shared!r}")
        for name, value in {"mid_dim": mid_dim, "found_mid_dim": found_mid_dim, "keep": keep, "steps": steps}.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"RouteSearch: {name} must be a whole number of at least 1, got {value!r}")
        for name, value, least in (
            ("sharpening", sharpening, 1),
            ("sparsity", sparsity, 0),
            ("gate_speed", gate_speed, 0),
        ):
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
                raise InputError(f"RouteSearch: {name} must be a number of at least {least}, got {value!r}")
        self.asked, self.mid_dim, self.found_mid_dim, self.keep = routes, mid_dim, found_mid_dim, keep
        self.shared, self.sparsity, self.speed = shared, sparsity, gate_speed
        self.growth = sharpening ** (1 / steps)
        self.routes: dict[str, str] = {}  # name -> kind of block
        self.blocks: dict[str, list[int]] = {}  # kind of block -> the group of gates of each block
        self.prefixes: tuple[str, ...] = ()

    def install(self, model: nn.Module) -> None:
        """Attach the adapters with their gates. Raises `InputError` for a route that the UNet does not have."""
        unet = model.model.diffusion_model
        self.routes = chosen_routes(unet, self.asked)
        if self.keep > len(self.routes):
            raise InputError(f"RouteSearch: keep is {self.keep}, but only {len(self.routes)} routes are searched")
        kinds = dict.fromkeys(self.routes.values())
        widths = sorted({width_of(block) for kind in kinds for _, block in tapped_blocks(unet, kind)})
        groups = {width: number if self.shared == "width" else 0 for number, width in enumerate(widths)}
        gates = RouteGates(max(groups.values()) + 1, len(self.routes), self.keep, self.speed)
        modules = dict(tapped_blocks(unet))
        attached: list[str] = []
        with forked_rng():  # later random numbers do not depend on the adapters
            for number, (route, kind) in enumerate(self.routes.items()):
                reads, writes = route.split("-")
                entry = check_entry(kind, {"din": reads, "dout": writes, "mid_dim": self.mid_dim})
                for name in attach_one(unet, kind, entry):
                    attached.append(name)
                    prefix, _, own = name.rpartition(".")
                    block = modules[prefix]
                    gate = Gate(gates, groups[width_of(block)], number)
                    block.routes = tuple(
                        Route(r.name, r.reads, r.writes, gate) if r.name == own else r for r in block.routes
                    )
        self.blocks = {kind: [groups[width_of(block)] for _, block in tapped_blocks(unet, kind)] for kind in kinds}
        like = next(unet.parameters())
        model.add_module(GATES, gates.to(like.device))
        self.prefixes = tuple(f"{UNET}{name}." for name in attached)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        if not self.prefixes:
            return {}
        return named(model, lambda name: name.startswith((*self.prefixes, f"{GATES}.")))

    def in_folder(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that a folder holds: the adapters, with the current gates as scales."""
        return {name: value for name, value in self.trainable(model).items() if not name.startswith(f"{GATES}.")}

    def after_step(self, model: nn.Module, rate: float) -> None:
        getattr(model, GATES).sharpen(rate, self.sparsity, self.growth)

    def gates(self, model: nn.Module) -> dict[str, float]:
        """The mean gate of each route over its blocks, the largest first."""
        table = getattr(model, GATES)().detach().cpu()
        means = {
            route: float(table[self.blocks[kind], number].mean())
            for number, (route, kind) in enumerate(self.routes.items())
        }
        return dict(sorted(means.items(), key=lambda item: -item[1]))

    def finish(self, model: nn.Module, run: Path) -> None:
        """Write `routes/gates.json` and a config `routes/<input>-<output>.yaml` for each found route."""
        gates = self.gates(model)
        best = dict(list(gates.items())[: self.keep])
        table = getattr(model, GATES)().detach().cpu()
        save_json(run / "routes" / "gates.json", {"gates": gates, "by_group": table.tolist(), "routes": [*self.routes]})
        for route, gate in best.items():
            save_text(run / "routes" / f"{route}.yaml", found_config(route, self.routes[route], gate, self, run))
        found = ", ".join(f"{route} (gate {gate:.2f})" for route, gate in best.items())
        log.info("route search: %s; configs are in %s", found, run / "routes")


def width_of(block: TappedBlock) -> int:
    """The width of a block's output."""
    return block.width(list(block.positions)[-1])


def chosen_routes(unet: nn.Module, asked: str | Iterable[str]) -> dict[str, str]:
    """The routes to search and the kind of their blocks, in the order of the data path.

    Raises `InputError` for a route that no block of the UNet has.
    """
    present: dict[str, str] = {}
    for kind in BLOCK_KINDS:
        for _, block in tapped_blocks(unet, kind):
            for reads in block.positions:
                for writes in block.valid_outputs(reads):
                    present.setdefault(f"{reads}-{writes}", kind)
    if asked == "all":
        return present
    wanted = [asked] if isinstance(asked, str) else list(asked)
    for route in wanted:
        if route not in present:
            raise InputError(f"RouteSearch: no block has the route {route!r}{did_you_mean(str(route), present)}")
    if not wanted:
        raise InputError("RouteSearch: routes is empty; leave it out to search all")
    return {route: kind for route, kind in present.items() if route in wanted}


def found_config(route: str, kind: str, gate: float, search: RouteSearch, run: Path) -> str:
    """The YAML of a route, over the config of the run that found it."""
    reads, writes = route.split("-")
    return f"""\
# Adapter {route}: found by a route search over {len(search.routes)} routes, with a gate of {gate:.3f} of {search.keep}.
# Run:    ldm train --base {shlex.quote(str(run / "routes" / route))}.yaml -t -n {route}
# Needs:  what the search needed; its pictures and options are those of ../configs/project.yaml.
# Expect: a training of this route alone.
defaults: ../configs/project.yaml

model:
  params:
    train_level: [adapter]
    tuning: []
    unet_config:
      params:
        adapter_config:
          {kind}:
            - type: inout
              din: {reads}
              dout: {writes}
              mid_dim: {search.found_mid_dim}
              method: default
              scale: 1.0
"""
