"""Scores a tuned model: draws pictures by DreamBooth's protocol and compares them with several networks.

    scores = score(model, "photos/a", "dog", Protocol(), prior=class_pictures(base, "dog", Protocol()))
    scores.values["clip_i"]     # Interval(mean, low, high, n)
    scores.row()                # {"clip_i": ..., "clip_i_low": ..., "clip_i_high": ..., ...}

The protocol: arXiv 2208.12242, Sec. 4.1 and 4.2.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm import generate
from ldm.data.pictures import find_pictures, read_picture
from ldm.errors import InputError
from ldm.evaluate.distances import distances
from ldm.evaluate.features import FeatureCache, Files, vectors_of
from ldm.evaluate.intervals import Interval, mean_interval
from ldm.evaluate.metrics import METRICS, Metric, column
from ldm.evaluate.networks import Network, default_networks, load_network
from ldm.evaluate.prompts import choose_templates, filled
from ldm.evaluate.protocol import Protocol
from ldm.models.bases import base_of

log = logging.getLogger(__name__)

Photographs = str | Path | Sequence[str | Path | Image.Image]


@dataclass(frozen=True)
class Drawn:
    """Pictures with their prompts and seeds; `captions` are the prompts without the subject's identifier.

    A prompt or caption is None if it is unknown.
    """

    pictures: Sequence[Image.Image]
    prompts: list[str | None]
    captions: list[str | None]
    seeds: list[int | None]


@dataclass
class Scores:
    """The scores by column, e.g. `clip_i`, and the values of single pictures of the subject."""

    values: dict[str, Interval]
    pictures: list[dict[str, Any]]
    networks: dict[str, dict[str, str]]  # label -> name and digest
    protocol: dict[str, Any]
    class_word: str
    seconds: float
    source: str = ""
    step: int | None = None
    notes: list[str] = field(default_factory=list)  # what is left out
    drawn: Drawn | None = None
    distances: dict[str, float] = field(default_factory=dict)  # clip_fid, clip_kid, clip_kid_std, ...

    def row(self) -> dict[str, float | None]:
        """The columns `x`, `x_low` and `x_high` of each value x."""
        found: dict[str, float | None] = {}
        for name, value in self.values.items():
            found |= {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high}
        return found | self.distances

    def as_json(self) -> dict[str, Any]:
        values = {name: asdict(value) for name, value in self.values.items()}
        rest = {name: getattr(self, name) for name in ("distances", "pictures", "networks", "protocol", "notes")}
        head = {"source": self.source, "step": self.step, "class_word": self.class_word, "seconds": self.seconds}
        return head | {"scores": values} | rest


# --- drawing


def draw(model: Any, prompts: Sequence[str], seeds: Sequence[int], protocol: Protocol, verbose: bool = False) -> list:
    """Draw PIL pictures of prompts and seeds, several prompts in a batch."""
    made: list[Image.Image] = []
    size = protocol.batch_size
    settings = generate.Settings(protocol.sampler, protocol.steps, scale=protocol.scale, half=True)
    for start in tqdm(range(0, len(prompts), size), desc="drawing", disable=not verbose, leave=False):
        part = slice(start, start + size)
        made += map(generate.to_pil, generate.generate(model, prompts[part], seeds[part], settings))
    return made


def subject_pictures(model: Any, class_word: str, protocol: Protocol, verbose: bool = False) -> Drawn:
    """The pictures of the subject: each prompt `per_prompt` times, every picture with its own seed."""
    templates = choose_templates(protocol.prompts, class_word)[: protocol.first]
    templates = [template for template in templates for _ in range(protocol.per_prompt)]
    seeds = list(range(protocol.seed, protocol.seed + len(templates)))
    prompts = filled(templates, f"{protocol.identifier} {class_word}")
    pictures = draw(model, prompts, seeds, protocol, verbose)
    return Drawn(pictures, prompts, filled(templates, class_word), seeds)


def class_pictures(model: Any, class_word: str, protocol: Protocol, verbose: bool = False) -> Drawn:
    """The pictures of the class, without the subject's identifier: of the base for `score(prior=...)`, or of a tuned
    model.

    Position adapters that are switched off stay off.
    """
    prompts = [p for p in filled(protocol.class_templates, class_word) for _ in range(protocol.per_class)]
    seeds = list(range(protocol.seed, protocol.seed + len(prompts)))
    return Drawn(draw(model, prompts, seeds, protocol, verbose) if prompts else [], prompts, prompts, seeds)


# --- comparing


def score(
    model: Any,
    photographs: Photographs,
    class_word: str,
    protocol: Protocol | None = None,
    prior: Drawn | None = None,
    cache: FeatureCache | None = None,
    verbose: bool = False,
) -> Scores:
    """Draw with a model and compare with photographs of the subject.

    `model` is a tuned `LatentDiffusion`; `photographs` are a folder, paths or pictures. `prior` are the base's class
    pictures, from `class_pictures(base, ...)` with the same protocol; without them there is no prior drift. A `cache`
    from an earlier call saves the computation for photographs and class pictures of the base. Raises `InputError`.
    """
    protocol, started = protocol or Protocol(), time.perf_counter()
    references = read_photographs(photographs)
    networks = load_networks(protocol, model)
    drawn = subject_pictures(model, class_word, protocol, verbose)
    tuned = class_pictures(model, class_word, protocol, verbose) if prior and prior.pictures else None
    if prior and tuned and (prior.prompts, prior.seeds) != (tuned.prompts, tuned.seeds):
        raise InputError("the class pictures of the base were drawn by another protocol: prompts and seeds must agree")
    scores = compare(drawn, references, class_word, networks, protocol, tuned, prior, cache, verbose)
    scores.seconds = time.perf_counter() - started
    return scores


def compare(
    drawn: Drawn,
    references: Sequence[Image.Image],
    class_word: str,
    networks: Mapping[str, Network],
    protocol: Protocol,
    tuned: Drawn | None = None,
    prior: Drawn | None = None,
    cache: FeatureCache | None = None,
    verbose: bool = False,
) -> Scores:
    """The scores of existing pictures. `tuned` and `prior` are class pictures with and without tuning."""
    started, cache = time.perf_counter(), cache or FeatureCache()
    values: dict[str, Interval] = {}
    pictures: list[dict[str, Any]] = [
        {"prompt": prompt, "seed": seed} for prompt, seed in zip(drawn.prompts, drawn.seeds, strict=True)
    ]
    notes: list[str] = []
    seen = {"drawn": drawn.pictures, "references": references}
    if tuned and prior:
        seen |= {"tuned": tuned.pictures, "prior": prior.pictures}
    for label, network in networks.items():
        vectors = {name: vectors_of(network, some, cache, verbose=verbose) for name, some in seen.items() if some}
        for name, metric in METRICS.items():
            groups = tuned.prompts if tuned and metric.against == "base" else drawn.prompts
            measured = _measured(metric, SIDES[metric.against](vectors, drawn, network), groups, protocol)
            if isinstance(measured, str):
                notes.append(f"{column(label, name)}: {measured}")
                continue
            found, values[column(label, name)] = measured
            if metric.against in ("subject", "captions") and found.ndim == 1:
                for picture, value in zip(pictures, found.tolist(), strict=True):
                    picture[column(label, name)] = value
    seconds = time.perf_counter() - started
    return Scores(values, pictures, _digests(networks), asdict(protocol), class_word, seconds, notes=notes, drawn=drawn)


def _digests(networks: Mapping[str, Network]) -> dict[str, dict[str, Any]]:
    return {label: {"name": network.name, "digest": network.digest} for label, network in networks.items()}


def _measured(
    metric: Metric, sides: tuple[Tensor, Tensor] | str, groups: Sequence[str], protocol: Protocol
) -> tuple[np.ndarray, Interval] | str:
    """The values of a metric and the interval of their mean, or why there are none."""
    if isinstance(sides, str):
        return sides
    found = metric.function(*sides).double().numpy()
    try:
        return found, mean_interval(found, groups, protocol.level, protocol.draws)
    except ValueError as error:
        return str(error)


def _with_photographs(vectors: Mapping[str, Tensor], _drawn: Drawn, _network: Network) -> tuple[Tensor, Tensor] | str:
    return (vectors["drawn"], vectors["references"]) if "references" in vectors else "no photographs of the subject"


def _with_captions(vectors: Mapping[str, Tensor], drawn: Drawn, network: Network) -> tuple[Tensor, Tensor] | str:
    if network.embed_captions is None:
        return "this network reads no text"
    if None in drawn.captions:
        return f"{drawn.captions.count(None)} of {len(drawn.captions)} pictures do not say their prompt"
    different = list(dict.fromkeys(drawn.captions))
    texts = dict(zip(different, network.embed_captions(different).float().cpu(), strict=True))
    return vectors["drawn"], torch.stack([texts[caption] for caption in drawn.captions])


def _with_each_other(vectors: Mapping[str, Tensor], _drawn: Drawn, _network: Network) -> tuple[Tensor, Tensor] | str:
    return vectors["drawn"], vectors["drawn"]


def _with_base(vectors: Mapping[str, Tensor], _drawn: Drawn, _network: Network) -> tuple[Tensor, Tensor] | str:
    return (vectors["tuned"], vectors["prior"]) if "prior" in vectors else "no class pictures of the base"


# The two arguments of a metric by what it compares with, or the reason why they are missing.
SIDES: dict[str, Callable[[Mapping[str, Tensor], Drawn, Network], tuple[Tensor, Tensor] | str]] = {
    "subject": _with_photographs, "captions": _with_captions, "each other": _with_each_other, "base": _with_base,
}  # fmt: skip


def add_distances(
    scores: Scores,
    references: Sequence[Image.Image],
    networks: Mapping[str, Network],
    cache: FeatureCache,
    verbose: bool = False,
) -> None:
    """Add FID and KID between the scored pictures and others. Raises `InputError` for too few pictures."""
    for label, network in networks.items():
        sets = (scores.drawn.pictures, references)
        ours, theirs = (vectors_of(network, pictures, cache, verbose=verbose) for pictures in sets)
        found = distances(ours, theirs)
        scores.distances |= {f"{label}_{name}": getattr(found, name) for name in ("fid", "kid", "kid_std")}


def read_photographs(given: Photographs) -> Sequence[Image.Image]:
    """RGB pictures from a folder, from paths, or the given pictures. Raises `InputError`."""
    if isinstance(given, (str, Path)):
        return Files(find_pictures(given))
    return [one.convert("RGB") if isinstance(one, Image.Image) else read_picture(one) for one in given]


def load_networks(protocol: Protocol, model: Any = None, device: Any = "cpu") -> dict[str, Network]:
    """The networks of a protocol by label, on the model's device if there is one; a second one of a kind is `clip2`,
    ...

    Raises `InputError` for missing networks.
    """
    names = protocol.networks
    if names is None:
        base = None if model is None else base_of(model.state_dict())
        names = default_networks(base and base.name)
    device = str(device if model is None else model.betas.device)
    found: dict[str, Network] = {}
    for name in dict.fromkeys(names):
        network = load_network(name, device, protocol.download)
        label = next(label for n in count(1) if (label := network.label + (str(n) if n > 1 else "")) not in found)
        found[label] = network
    return found
