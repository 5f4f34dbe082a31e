"""How the cost of a training step of the small model grows: with resolution, batch, adapters and trainings at once.

    python benchmarks/scaling.py

Prints for each the time of a step, the exponent of the fitted power law, and for K trainings side by side the ratio to
K trainings one after the other, which is its peer.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable

import torch
from common import best_device, machine, parser, timed

from ldm.config import find_file, load_config, plain
from ldm.modules.adapters import attach_adapters
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.tuning.side_by_side import join, view

CONFIG = "configs/sd-mini/attn2o-ffni.yaml"
ROUTES = ("attn2o-ffni", "attn1i-transo", "ffni-transo", "attn1o-attn2i", "attn2i-ffni", "ffno-transo", "attn1i-ffni")


def entries(count: int) -> list[dict]:
    """That many adapters, on different routes."""
    routes = [ROUTES[i % len(ROUTES)].split("-") for i in range(count)]
    return [{"din": reads, "dout": writes, "mid_dim": 24} for reads, writes in routes]


def step_of(
    latent: int = 16, batch: int = 2, adapters: int = 1, trainings: int = 1, device: torch.device | None = None
) -> Callable[[], None]:
    """A step of the small model's UNet with everything frozen but adapters."""
    device = best_device() if device is None else device
    params = plain(load_config(find_file(CONFIG)).model.params.unet_config.params) | {"adapter_config": None}
    unet = UNetModel(**params).to(device)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    unet.requires_grad_(False)
    frozen = {id(p) for p in unet.parameters()}
    views = [view(unet) for _ in range(trainings)]
    for one in views:
        attach_adapters(one, {"transformer_adp_config": entries(adapters)})
    unet = view(unet)
    join(unet, views)
    unet.to(device)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if id(p) not in frozen], lr=1e-4)
    x = torch.randn(batch * trainings, 4, latent, latent, device=device)
    context = torch.randn(len(x), 32, params["context_dim"], device=device)
    t = torch.arange(len(x), device=device)

    def step() -> None:
        optimizer.zero_grad()
        unet(x, t, context).square().mean().backward()
        optimizer.step()

    return step


SERIES = {
    "latent": [8, 16, 32],
    "batch": [2, 4, 8, 16],
    "adapters": [1, 2, 4, 7],
    "trainings": [1, 2, 4, 8],
}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """The slope of log(seconds) over log(size), by least squares."""
    xs, ys = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    x, y = statistics.mean(xs), statistics.mean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


def measured(series: dict[str, list[int]], repeats: int, device: torch.device) -> dict[str, dict]:
    """For each series its sizes, the median seconds of a step, the exponent; for trainings the ratio to their peer."""
    result = {}
    for name, sizes in series.items():
        steps = [step_of(**{name: size}, device=device) for size in sizes]
        seconds = [statistics.median(timed(step, repeats, device, warm_up=2)) for step in steps]
        result[name] = {"sizes": sizes, "seconds": seconds, "exponent": exponent(sizes, seconds)}
    if row := result.get("trainings"):
        peers = [size * row["seconds"][0] / row["sizes"][0] for size in row["sizes"]]
        row["ratio to one after the other"] = [s / peer for s, peer in zip(row["seconds"], peers, strict=True)]
    return result


def main() -> None:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    result = measured(SERIES, options.repeats, options.device)
    if options.json:
        print(json.dumps({"machine": machine(), **result}))
        return
    print(machine())
    print("| what grows | sizes | ms per step | exponent | ratio to one after the other |")
    print("| --- | --- | --- | ---: | --- |")
    for name, row in result.items():
        cells = [", ".join(map(str, row["sizes"])), ", ".join(f"{1000 * s:.0f}" for s in row["seconds"])]
        ratios = ", ".join(f"{r:.2f}" for r in row.get("ratio to one after the other", []))
        print(f"| {name} | {cells[0]} | {cells[1]} | {row['exponent']:.2f} | {ratios} |")


if __name__ == "__main__":
    main()
