"""Puts pictures, words and the base model from the command line into a DreamBooth config (arXiv 2208.12242)."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from ldm.config import get_obj_from_str, parameters_of
from ldm.data.captions import EXTENSIONS, TABLES
from ldm.data.folder import folders_in
from ldm.data.loss_masks import FOLDERS
from ldm.data.pictures import LABEL, find_pictures
from ldm.errors import InputError
from ldm.modules.encoders.tokens import load_words
from ldm.schema import DreamBooth
from ldm.train import concepts, run_folder
from ldm.train import run as runs
from ldm.train.from_delta import begin_at_delta
from ldm.train.run_config import opened, with_trainer
from ldm.train.run_folder import Run

log = logging.getLogger(__name__)

UNET = "model.diffusion_model"
BESIDE = (*EXTENSIONS, *TABLES, LABEL, *FOLDERS)  # files beside pictures of which the datasets tell
NO_WORD = "what is on the class pictures? name it with --class_word, e.g. --class_word dog"
DEFAULTS = {key: value for key, value in DreamBooth().model_dump().items() if value is not None}


def plan(options: argparse.Namespace, trainer_options: dict[str, Any], overrides: list[str]) -> Run:
    """The run that the options ask for: a new one, or one to go on with. Raises `InputError`."""
    config, folder, checkpoint = opened(options, overrides, trainer_options)
    stored = config.get("dreambooth") or {}
    asked = {
        "base": options.actual_resume,
        "data_root": options.data_root,
        "reg_data_root": options.reg_data_root,
        "class_word": options.class_word,
        "seed": options.seed,
        "scale_lr": options.scale_lr,
        "keep_memory": options.keep_memory,
        "cache": options.cache,
        "base_precision": options.base_precision,
        "class_scale": options.class_scale,
        "captions": asked_captions(options),
        "delta": getattr(options, "delta_ckpt", None),
        "words": getattr(options, "embedding_manager_ckpt", None) or None,
        "concepts": concepts.asked(options) or None,
    }
    settings = OmegaConf.merge(DEFAULTS, stored, {key: value for key, value in asked.items() if value is not None})
    config = OmegaConf.merge(config, {"dreambooth": settings})
    if OmegaConf.select(config, "data.params.train") is None:
        raise InputError("data.params.train.target is missing: it names the class that shows the photographs")
    concepts.fill_in_words(config, options)
    if batch_size := getattr(options, "batch_size", None):
        config.data.params.batch_size = batch_size
    if has_concepts(config):
        if asked["captions"]:
            raise InputError("--captions is not for Custom Diffusion; there --caption names a text file of captions")
        concepts.fill_in(config, settings, getattr(options, "repeat", None))
    elif getattr(options, "repeat", None):
        raise InputError("--repeat is for Custom Diffusion; here it is data.params.train.params.repeats=N")
    elif asked["concepts"]:
        raise InputError("--datapath and --concepts_list are for Custom Diffusion; here --data_root names the pictures")
    else:
        fill_in_pictures(config, settings, options.num_class_images)
    if mode := getattr(options, "compile", None):
        compiled = {"target": "ldm.train.compiled.Compiled", "params": {"modules": [UNET], "mode": mode}}
        config = OmegaConf.merge(config, {"lightning": {"callbacks": {"compiled": compiled}}})
    config = with_trainer(config, options.gpus, trainer_options)
    return as_run(config, folder or new_folder(options), checkpoint, options.debug)


def as_run(config: DictConfig, folder: Path, checkpoint: Path | None = None, debug: bool = False) -> Run:
    """The run of a config that is complete: as planned, or as stored in a run's folder."""
    settings, is_custom = OmegaConf.merge(DEFAULTS, config.dreambooth), has_concepts(config)
    train = {} if is_custom else config.data.params.train.get("params", {})
    named = train.get("identifier") or train.get("placeholder_token", "sks")
    return Run(
        config=config,
        folder=folder,
        base=settings.get("base"),
        resume=checkpoint,
        seed=settings.seed,
        scale_lr=settings.scale_lr,
        keep_memory=settings.keep_memory,
        debug=debug,
        cache=settings.cache,
        base_precision=settings.base_precision,
        notes={
            "identifier": concepts.first_word(config) if is_custom else named,
            "class_word": settings.get("class_word"),
        },
    )


def has_concepts(config: DictConfig) -> bool:
    """Whether the training set is one of Custom Diffusion's, which read the class pictures themselves."""
    train = config.data.get("params", {}).get("train")
    first = train[0] if OmegaConf.is_list(train) else train
    return first is not None and concepts.takes(first.get("target"), "datapath")


def new_folder(options: argparse.Namespace) -> Path:
    name = options.name or Path(options.base[0]).stem
    root = options.data_root or next(iter(options.datapath), None)
    data = Path(root).resolve().name if options.datadir_in_name and root else ""
    return run_folder.new_folder(options.logdir, options.project, data, name, options.postfix)


def fill_in_pictures(config: DictConfig, settings: DictConfig, num_class_images: int) -> None:
    """Put the folders, the class word and the seed into the data section. Raises `InputError` for what is missing."""
    sets = config.data.get("params", {})
    _check_given(sets, settings)
    root, word = settings.get("data_root"), settings.get("class_word")
    roots = {"train": root, "validation": root, "reg": settings.get("reg_data_root")}
    for name, root in roots.items():
        if (dataset := sets.get(name)) is not None:
            _fill_in(dataset, {"seed": settings.seed, "data_root": root or None, "class_word": word or None})
    if settings.get("captions") is not None:
        fill_in_captions(sets, settings.captions)
    for name in ("train", *(["reg"] if sets.get("reg") is not None and not num_class_images else [])):
        _check_folders(sets[name], roots[name])


def _check_given(sets: Mapping, settings: Mapping) -> None:
    if not settings.get("data_root") and not OmegaConf.select(sets, "train.params.concepts"):
        raise InputError("no photographs: name their folder with --data_root")
    if sets.get("reg") is None:
        return
    if not settings.get("reg_data_root"):
        raise InputError(
            "no class pictures: name their folder with --reg_data_root (--num_class_images N fills it), "
            "or train without prior preservation by data.params.reg=null"
        )
    if not (settings.get("class_word") or OmegaConf.select(sets, "reg.params.class_word")):
        raise InputError(NO_WORD)


def _fill_in(dataset: DictConfig, values: Mapping[str, Any]) -> None:
    """Put those values that are given into the parameters of a dataset that takes them."""
    _, known = parameters_of(get_obj_from_str(dataset.target))
    taken = {key: value for key, value in values.items() if value is not None and (known is None or key in known)}
    dataset.params = OmegaConf.merge(dataset.get("params") or {}, taken)


def _check_folders(dataset: DictConfig, root: str | None) -> None:
    """Raise `InputError` for a folder without pictures, before the base model is loaded."""
    if OmegaConf.select(dataset, "params.concepts"):
        return
    several = concepts.takes(dataset.target, "concepts")
    for folder in folders_in(root) if several else [{"data_root": root}]:
        find_pictures(folder["data_root"], BESIDE)


def fill_in_captions(sets: DictConfig, captions: Any) -> None:
    """Put the setting `captions` into the sets that show the photographs. Raises `InputError` if they do not take it.
    """
    for name in ("train", "validation"):
        if (dataset := sets.get(name)) is None:
            continue
        if not concepts.takes(dataset.target, "captions"):
            raise InputError(f"--captions: data.params.{name} is a {dataset.target}, which makes its captions itself")
        given = dataset.params.get("captions")
        both = [{"source": one} if isinstance(one, str) else one for one in (given or {}, captions)]
        dataset.params.captions = OmegaConf.merge(*both)


def asked_captions(options: argparse.Namespace) -> dict[str, Any] | None:
    """The setting `captions` of the command line. An ending of caption files means that they are read."""
    ext = getattr(options, "caption_ext", None)
    source = getattr(options, "captions", None) or ("txt" if ext else None)
    return ({"source": source} | ({"ext": ext} if ext else {})) if source else None


def report(run: Run) -> str:
    """What would be trained, without training it."""
    model = runs.base_model(run)
    learning = model.trainable_parameters()
    count, total = sum(p.numel() for p in learning.values()), sum(p.numel() for p in model.model.parameters())
    return f"{len(learning)} tensors with {count:,} weights learn, {100 * count / total:.3f} % of the UNet"


def train(run: Run, options: argparse.Namespace) -> pl.Trainer:
    """Load the base model, draw the class pictures that are missing, train, test."""
    with runs.before_the_first_step():
        model = runs.base_model(run)
        if file := run.config.dreambooth.get("words"):
            words = load_words(model, file, "--embedding_manager_ckpt")
            log.info("learnt words %s added to the text encoder", ", ".join(words))
        if (file := run.config.dreambooth.get("delta")) and run.resume is None:
            log.info("begun at %s, words %s", file, ", ".join(begin_at_delta(model, file)) or "none")
        if options.num_class_images:
            for folder, caption in class_folders(run.config):
                runs.prepare_class_pictures(run, model, folder, caption, options.num_class_images)
    return runs.train(run, model, test=not options.no_test)


def class_folders(config: DictConfig) -> list[tuple[Path, str]]:
    """The folders of class pictures that a training reads, each with the prompt that fills it."""
    folders = [(Path(root), caption) for root, caption in concepts.class_pictures(config)]
    reg = config.data.params.get("reg")
    return folders if reg is None else [*folders, (Path(reg.params.data_root), class_caption(reg))]


def class_caption(reg: DictConfig) -> str:
    """The caption of class pictures."""
    params = reg.get("params", {})
    templates = params.get("templates") or "photo of a {}"  # none where all pictures have captions
    template = templates if isinstance(templates, str) else templates[0]
    return template.replace("{}", params.class_word).replace("{word}", params.class_word)
