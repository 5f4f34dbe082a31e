"""Guidance scales compared: CLIP-T against FID and KID of the same prompts, for each scale and checkpoint.

The figure is that of Stable Diffusion's model card (README of CompVis/stable-diffusion, "Evaluation Results"), whose
scores were of 10,000 captions of COCO by 50 steps of PLMS. Scores depend on the networks that see the pictures.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ldm.checkpoints import atomic_write
from ldm.data.captions import find_captions
from ldm.data.pictures import find_pictures
from ldm.errors import InputError
from ldm.evaluate.features import FeatureCache
from ldm.evaluate.networks import Network
from ldm.evaluate.protocol import Protocol
from ldm.evaluate.runs import keep as keep_pictures
from ldm.evaluate.scoring import Drawn, add_distances, compare, draw
from ldm.files import read_text

LEAST = 4  # pictures, of which FID and KID need some


def read_prompts(captions: str | Path, number: int | None = None, seed: int = 0) -> list[str]:
    """The captions of a text file (one per line) or of a folder of captioned pictures; `number` of them at random.

    Raises `InputError` for fewer than four.
    """
    path = Path(captions)
    if path.is_dir():
        pictures = find_pictures(path, (".txt", ".caption", ".jsonl", ".csv", ".parquet"))
        found, _ = find_captions(path, tuple(picture.name for picture in pictures), "auto")
        prompts = [texts[0] for texts in found.values() if texts]
    elif path.is_file():
        prompts = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    else:
        raise InputError(f"--captions {path}: expected a text file with a caption per line, or a captioned folder")
    if number is not None and number < len(prompts):
        prompts = random.Random(seed).sample(prompts, number)
    if len(prompts) < LEAST:
        raise InputError(f"--captions {path} has {len(prompts)} captions; expected at least {LEAST}")
    return prompts


def measured(
    model: Any,
    prompts: Sequence[str],
    references: Sequence[Image.Image],
    scales: Sequence[float],
    networks: Mapping[str, Network],
    protocol: Protocol,
    cache: FeatureCache,
    keep: Path | None = None,
    verbose: bool = False,
) -> Iterator[dict[str, Any]]:
    """For each scale a row of scores: CLIP-T with its interval, FID and KID to the references, of each network.

    All scales have the same prompts and seeds. keep: a folder for the pictures, one folder for each scale.
    """
    seeds = list(range(protocol.seed, protocol.seed + len(prompts)))
    for scale in scales:
        used = replace(protocol, scale=scale)
        drawn = Drawn(draw(model, prompts, seeds, used, verbose), list(prompts), list(prompts), seeds)
        scores = compare(drawn, [], "", networks, used, cache=cache, verbose=verbose)
        add_distances(scores, references, networks, cache, verbose)
        if keep is not None:
            keep_pictures(drawn, keep / f"{scale:g}")
        kept = {name: value for name, value in scores.row().items() if "_t" in name or name in scores.distances}
        yield {"scale": scale, "pictures": len(prompts), **kept}


def save(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def figure(path: Path, rows: Sequence[Mapping[str, Any]], clip: str, distance: str) -> None:
    """CLIP-T over FID and over KID: a line for each checkpoint, a point for each scale. The suffix is the format.

    clip: label of the network of CLIP-T; distance: label of the network of FID and KID
    """
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9, 4), layout="constrained")
    panels = drawing.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("fid", "kid"), strict=True):
        for name in dict.fromkeys(row["checkpoint"] for row in rows):
            own = [row for row in rows if row["checkpoint"] == name]
            x, y = ([row[column] for row in own] for column in (f"{distance}_{kind}", f"{clip}_t"))
            axes.plot(x, y, marker="o", markersize=4, label=name)
            for row, across, up in zip(own, x, y, strict=True):
                axes.annotate(f"{row['scale']:g}", (across, up), (3, 3), textcoords="offset points", fontsize=7)
        axes.set(xlabel=f"{kind.upper()} ({distance})")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel=f"CLIP-T ({clip})")
    panels[0].legend(fontsize=8)
    with atomic_write(path) as beside:
        drawing.savefig(beside, dpi=150)
