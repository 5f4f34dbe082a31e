"""Puts concepts and learnt words from the command line into a config (Custom Diffusion, textual inversion)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm.config import get_obj_from_str, parameters_of
from ldm.data.custom import CONCEPT, read_concepts
from ldm.errors import InputError

log = logging.getLogger(__name__)

WRAPPER = "ldm.modules.encoders.modules.FrozenCLIPEmbedderWrapper"


def takes(target: Any, name: str) -> bool:
    """Whether the class or function of a dotted name has a parameter of that name."""
    return name in (parameters_of(get_obj_from_str(str(target)))[1] or [])


def asked(options: argparse.Namespace) -> list[dict[str, str]]:
    """The concepts of the command line. Raises `InputError` if their options contradict each other."""
    given = {key: getattr(options, key) for key in CONCEPT if getattr(options, key)}
    if options.concepts_list:
        if given:
            raise InputError(f"--concepts_list names the concepts; leave --{', --'.join(given)} out")
        return read_concepts(options.concepts_list)
    counts = {len(values) for values in given.values()}
    if given and (len(counts) > 1 or not {"datapath", "caption"} <= given.keys()):
        counts = ", ".join(f"{len(values)} times --{key}" for key, values in given.items())
        raise InputError(f"each concept needs --datapath and --caption, all or none --reg_datapath; got {counts}")
    return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]


def fill_in(config: DictConfig, settings: Mapping[str, Any], repeat: int | None = None) -> None:
    """Put the concepts into the data section; without any, the photographs and class word of DreamBooth as one.

    `repeat`: how often an epoch shows each picture, where it is not the config that says so.
    """
    sets, word = config.data.params, first_word(config)
    concepts = settings.get("concepts")
    if not concepts:
        class_word = settings.get("class_word")
        concept = {"datapath": settings.get("data_root"), "caption": f"{word} {class_word}" if class_word else word}
        if settings.get("reg_data_root"):
            if not class_word:
                raise InputError("what is on the class pictures? name it with --class_word, e.g. --class_word dog")
            concept |= {"reg_datapath": settings["reg_data_root"], "reg_caption": class_word}
        concepts = [concept]
    if not concepts[0].get("datapath"):
        raise InputError("no photographs: name their folder with --datapath and --caption, or with --data_root")
    again = {} if repeat is None else {"repeat": repeat}
    given = list(sets.train) if OmegaConf.is_list(sets.train) else [sets.train]
    kinds = [*given, *[sets.get("train2") or given[0]] * len(concepts)][: len(concepts)]  # all are given on a resume
    sets.train = [
        OmegaConf.merge(kind, {"params": {**concept, "seed": settings["seed"], **again}})
        for kind, concept in zip(kinds, concepts, strict=True)
    ]
    sets.train2 = None


def first_word(config: DictConfig) -> str:
    """The word that stands for the subject where the command line gives no caption."""
    return (OmegaConf.select(config, "model.params.cond_stage_config.params.modifier_token") or "sks").split("+")[0]


def fill_in_words(config: DictConfig, options: argparse.Namespace) -> None:
    """Put `--modifier_token`, `--freeze_model` and `--init_word` into the model section. Raises `InputError`."""
    model = config.model
    for name in ("modifier_token", "freeze_model"):
        if getattr(options, name) and not takes(model.target, "freeze_model"):
            raise InputError(f"--{name} is for Custom Diffusion, this config's model is {model.target}")
    if options.modifier_token:
        params = OmegaConf.merge(
            model.params.cond_stage_config.get("params") or {}, {"modifier_token": options.modifier_token}
        )
        model.params.cond_stage_config = {"target": WRAPPER, "params": params}
        model.params.add_token = True
    if options.freeze_model:
        model.params.freeze_model = options.freeze_model
    if options.init_word:
        tuning = model.params.get("tuning") or []
        entries = [model, *([tuning] if OmegaConf.is_dict(tuning) else tuning)]
        learning = [entry for entry in entries if takes(entry.target, "init_word")]
        for entry in learning:
            entry.params = OmegaConf.merge(entry.get("params") or {}, {"init_word": options.init_word})
        if not learning:
            log.warning("--init_word %s has no effect: no word is learnt in this config", options.init_word)


def class_pictures(config: DictConfig) -> list[tuple[str, str]]:
    """The folder and the caption of each concept's class pictures."""
    sets = config.data.params.train
    sets = [concept.params for concept in sets] if OmegaConf.is_list(sets) else []
    return [(one.reg_datapath, f"photo of a {one.reg_caption}") for one in sets if one.get("reg_datapath")]
