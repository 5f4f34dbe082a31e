"""What a user chooses of a base beside its path: another autoencoder, other text encoders, averaged weights or not."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.config import plain
from ldm.errors import InputError
from ldm.interchange import diffusers_json, layers
from ldm.interchange.base_parts import Found, read_text_encoders, read_vae
from ldm.models import bases
from ldm.models.bases import EMA, FIRST_STAGE

log = logging.getLogger(__name__)

OF_EMA = ("decay", "num_updates")  # of the average itself


@dataclass(frozen=True)
class Choice:
    """Parts that take the place of a base's own, and which weights are read where a base holds two sets.

    vae, text_encoders: files or folders, see `base_parts`
    ema: True for the average of the base's training, False for its last weights, None for what has the usual names
    """

    vae: str | None = None
    text_encoders: tuple[str, ...] = ()
    ema: bool | None = None

    @staticmethod
    def of(config: Any) -> Choice:
        """The choice in `checkpoint` of a config, or none."""
        own = plain(config).get("checkpoint") if config is not None else None
        own = own if isinstance(own, Mapping) else {}
        text = own.get("text_encoder") or ()
        return Choice(own.get("vae"), (text,) if isinstance(text, str) else tuple(text), own.get("ema"))

    @staticmethod
    def asked(options: argparse.Namespace) -> Choice:
        """The choice of a command line, see `ldm.cli.add_base_parts`."""
        return Choice(options.vae, tuple(options.text_encoder or ()), options.ema)

    def into(self, config: Any) -> Any:
        """Put what is chosen into `checkpoint` of a config, in place; returns the config."""
        from omegaconf import OmegaConf

        values = {"vae": self.vae, "text_encoder": list(self.text_encoders) or None, "ema": self.ema}
        for name, value in values.items():
            if value is not None:
                OmegaConf.update(config, f"checkpoint.{name}", value, force_add=True)
        return config

    @property
    def paths(self) -> list[str]:
        """The files and folders of other parts."""
        return [*([self.vae] if self.vae else []), *self.text_encoders]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of a base that others take the place of, or may."""
        text = ("text_encoder", "text_encoder_2") if self.text_encoders else ()
        return (*(("vae",) if self.vae else ()), *text)

    def averaged(self, weights: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
        """The weights of a checkpoint with their averages in their place, or without them.

        Raises `InputError` if it does not hold both.
        """
        if self.ema is None:
            return weights
        averages = {n.removeprefix(EMA): v for n, v in weights.items() if n.startswith(EMA)}
        averages = {name: value for name, value in averages.items() if name not in OF_EMA}
        if not averages:
            raise InputError(f"{source} holds one set of weights ({EMA}* is not in it): leave --ema out")
        kept = {name: value for name, value in weights.items() if not name.startswith(EMA)}
        if not self.ema:
            log.info("%s: weights without the average of training; %d averages left out", source, len(averages))
            return kept
        places = {name.removeprefix("model.").replace(".", ""): name for name in kept if name.startswith("model.")}
        if lost := [name for name in averages if name not in places]:
            raise InputError(f"{source}: {len(lost)} averages belong to no weight of the file, e.g. {EMA}{lost[0]}")
        log.info("%s: averages of training (EMA) of %d weights", source, len(averages))
        return kept | {places[name]: value for name, value in averages.items()}

    def completed(
        self, weights: Mapping[str, Tensor], source: str, config: Any
    ) -> tuple[Mapping[str, Tensor], set[str]]:
        """The weights of a base with the chosen parts, by the names of the model of `config`, and the parts' names.

        Raises `InputError` for parts that the model does not have or that do not fit it.
        """
        if not self.paths:
            return weights, set()
        if config is None:
            raise InputError(f"{self.paths[0]}: give the config of the model that it is for, too")
        weights, params = dict(bases.in_model_names(weights)), plain(config)["model"]["params"]
        found = [read_vae(self.vae)] if self.vae else []
        found += [one for path in self.text_encoders for one in read_text_encoders(path)]
        slots = _slots(layers.skeleton(plain(config)))
        taken: set[str] = set()
        for one in found:
            name, prefix, fitting = _fitted(one, slots, taken)
            if one.json is not None:
                diffusers_json.check_part(one.json, name, params, one.source)
            had = [key for key in weights if key.startswith(prefix)]
            log.info("%s: %s of %s%s", source, name, one.source, ", instead of its own" if had else "")
            for key in had:
                del weights[key]
            weights |= {prefix + key: value for key, value in fitting.items()}
            taken.add(name)
        return weights, taken


NONE = Choice()


@dataclass(frozen=True)
class Slot:
    """A part of a model: the prefix of its weights, their names below it with shapes, and how they are spelt."""

    prefix: str
    shapes: Mapping[str, tuple[int, ...]]
    spelling: str


def _slots(model: Any) -> dict[str, Slot]:
    """The parts of a model that can be given, by the names of the parts of a `Base`."""
    state = {name: tuple(value.shape) for name, value in model.state_dict().items() if not bases.is_ignored(name)}
    prefixes = {"vae": (FIRST_STAGE, "vae")}
    for name, (prefix, _) in layers.parts(model).items():
        if name != "unet":
            is_clip = ".transformer." in prefix
            prefixes[name] = (prefix.removesuffix("text_model."), "clip") if is_clip else (prefix, "open_clip")
    found = {}
    for name, (prefix, spelling) in prefixes.items():
        shapes = {key.removeprefix(prefix): shape for key, shape in state.items() if key.startswith(prefix)}
        found[name] = Slot(prefix, shapes, spelling)
    return found


def _fitted(one: Found, slots: Mapping[str, Slot], taken: set[str]) -> tuple[str, str, Mapping[str, Tensor]]:
    """The first free slot that a part fits: its name, its prefix, and the weights by the names there."""
    why = []
    for name, slot in slots.items():
        if name.startswith(one.kind) and slot.shapes and name not in taken:
            weights = one.spelt(slot.spelling)
            misfit = _misfit(weights, slot)
            if misfit is None:
                return name, slot.prefix, weights
            why.append(f"{name}: {misfit}")
    what = one.kind.replace("_", " ")
    told = "; ".join(why) or f"it has no {what} with weights, or all of them are given already"
    raise InputError(f"{one.source} does not fit as the {what} of this config ({told})")


def _misfit(weights: Mapping[str, Tensor], slot: Slot) -> str | None:
    """What does not fit, in words; None if all does."""
    own = {name: value for name, value in weights.items() if not bases.is_ignored(name)}
    if lacking := [name for name in slot.shapes if name not in own]:
        return f"{lacking[0]} is not in it, {len(lacking)} such"
    if more := [name for name in own if name not in slot.shapes]:
        return f"no place for {more[0]}, {len(more)} such"
    wrong = [name for name, value in own.items() if tuple(value.shape) != slot.shapes[name]]
    if wrong:
        return f"{wrong[0]} has shape {list(own[wrong[0]].shape)}, the model wants {list(slot.shapes[wrong[0]])}"
    return None
