"""The scores of trials: the protocol of a sweep, and what a worker keeps between trials to score by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from ldm.errors import InputError, did_you_mean
from ldm.evaluate.features import FeatureCache
from ldm.evaluate.networks import default_networks, folder_of, is_there
from ldm.evaluate.protocol import PROTOCOLS, Protocol
from ldm.evaluate.scoring import Drawn, Scores, class_pictures, score, subject_pictures
from ldm.generate import save_png
from ldm.interchange.base_files import base_weights
from ldm.models.bases import base_of
from ldm.models.building import choose_checkpoint
from ldm.study.keys import digest, folder_digest
from ldm.train.run_folder import Run

CHOSEN = "protocol"  # names the one that the other keys change


def check(given: Mapping[str, Any]) -> None:
    """Raises `InputError` for a key that is neither one of `Protocol` nor `protocol`, and for an unknown protocol."""
    known = [CHOSEN, *(one.name for one in fields(Protocol) if one.name not in ("identifier", "class_templates"))]
    if unknown := [name for name in given if name not in known]:
        raise InputError(f"evaluate.{unknown[0]} is unknown{did_you_mean(unknown[0], known)}")
    if (name := given.get(CHOSEN)) not in (None, *PROTOCOLS):
        raise InputError(f"evaluate.protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")


def protocol_for(run: Run, given: Mapping[str, Any]) -> Protocol:
    """How the trials of a sweep are scored: by `mini` on SD-mini and `fast` on others, with what is given instead.

    Both draw 16 pictures of the subject. Raises `InputError` for networks that are not there.
    """
    path, _ = choose_checkpoint(run.config, run.base)
    base = base_of(base_weights(path)) if path else None
    name = base and base.name
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if key != CHOSEN}
    protocol = replace(PROTOCOLS[given.get(CHOSEN) or ("mini" if name == "sd-mini" else "fast")], **values)
    networks = protocol.networks or tuple(default_networks(name))
    if absent := [network for network in networks if not (protocol.download or is_there(network))]:
        raise InputError(f"no network {absent[0]}: name folders of networks that are there with --network")
    return replace(protocol, networks=(networks,) if isinstance(networks, str) else networks)


def determined_by(protocol: Protocol) -> dict[str, Any]:
    """A protocol by what determines its numbers: networks count by their files."""
    networks = [folder_digest(folder_of(name) or name) for name in protocol.networks or ()]
    return {**asdict(protocol), "networks": networks, "batch_size": None, "download": None}


class Scorer:
    """Scores models by a protocol; keeps what photographs look like, and the class pictures of base models."""

    def __init__(self) -> None:
        self.cache = FeatureCache()
        self.priors: dict[str, Drawn] = {}

    def scores(self, model: Any, run: Run, protocol: Protocol, base_name: str, base: Callable[[], Any]) -> Scores:
        """The scores of a tuned model. `base` gives its base without tuning, `base_name` tells bases apart."""
        own = protocol_of(run, protocol)
        word, folder = run.notes["class_word"], run.config.dreambooth.data_root
        name = digest([base_name, word, asdict(own)])
        if name not in self.priors:
            self.priors[name] = class_pictures(base(), word, own)
        return score(model, folder, word, own, self.priors[name], self.cache)

    def keep_base(self, run: Run, protocol: Protocol, base_name: str, base: Callable[[], Any], folder: Path) -> str:
        """Write what the base draws from a trial's prompts and seeds, once for all trials that share them; its name.

        They lie in `folder/<name>`: pictures before tuning, to be shown beside those after it.
        """
        own, word = protocol_of(run, protocol), run.notes["class_word"]
        name = digest([base_name, word, asdict(own)])
        if not (folder / name).is_dir():
            save(subject_pictures(base(), word, own), folder / name)
        return name


def protocol_of(run: Run, protocol: Protocol) -> Protocol:
    """A protocol with the words of a training: what stands for its subject, and how its class is called."""
    train = run.config.data.params.train
    templates = (train.get("params") or {}).get("templates") if OmegaConf.is_dict(train) else None
    template = templates if isinstance(templates, str) else next(iter(templates or []), "photo of a {}")
    plain = template if template.count("{}") == 1 and template.count("{") == 1 else "photo of a {}"
    return replace(protocol, identifier=run.notes["identifier"], class_templates=(plain,))


def save(drawn: Drawn, folder: Path) -> None:
    """Write the pictures of a trial as PNG, each with its prompt and seed."""
    for number, (picture, prompt, seed) in enumerate(zip(drawn.pictures, drawn.prompts, drawn.seeds, strict=True)):
        values = torch.from_numpy(np.array(picture)).movedim(-1, 0) / 255  # h w c -> c h w
        save_png(values, folder / f"{number:02}.png", {"prompt": prompt, "seed": seed})
