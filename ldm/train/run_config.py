"""The config of a run: read, merged with the command line, and checked."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldm import schema
from ldm.config import (
    check,
    check_entries,
    find_file,
    get_obj_from_str,
    load_config,
    merged,
    override,
    parameters_of,
    plain,
    stored_config,
    unet_params,
)
from ldm.data.folder import read_concept
from ldm.errors import InputError
from ldm.interchange.base_files import known_base
from ldm.train import short_options
from ldm.train.optimizers import spell_out
from ldm.train.run_folder import resumed_folder
from ldm.writing import printable

log = logging.getLogger(__name__)

AUTO = "auto"


def read_configs(
    paths: list[str], overrides: list[str], resumed: Path | None, options: argparse.Namespace | None = None
) -> DictConfig:
    """Merge the config of a resumed run, the configs of the command line, its short options, and the overrides.

    Later ones win.
    """
    stored = [stored_config(resumed / "configs" / "project.yaml")] if resumed else []
    if not stored and not paths:
        raise InputError("no config: name one with --base, e.g. --base configs/sd-mini/attn2o-ffni.yaml")
    configs = [*stored, *(load_config(find_file(path)) for path in paths)]
    for first, second in itertools.pairwise(zip([*[resumed] * len(stored), *paths], configs, strict=True)):
        tell_of_adapters(first, second)
    config = merged(*configs)
    if options is not None:
        config = short_options.changed(config, options, is_resumed=resumed is not None)
    config = override(config, overrides)
    spell_out(config)
    spread_concepts(config)
    check_config(config)
    for section in ("model", "data"):
        if config.get(section) is None:
            raise InputError(f"the config has no {section!r} section; its keys are {list(config)}")
    for section in ("lightning", "lightning.trainer", "lightning.callbacks", "lightning.modelcheckpoint"):
        if OmegaConf.select(config, section) is None:
            OmegaConf.update(config, section, {})  # left out, or `callbacks:` with nothing below it
    return config


def spread_concepts(config: DictConfig) -> None:
    """Turn the section `concepts` of a config into parameters of its datasets, in place. Raises `InputError`."""
    folders = config.pop("concepts", None)
    if folders is None:
        return
    for number, folder in enumerate(folders):
        read_concept(plain(folder), number)
    for name in ("train", "validation"):
        dataset = OmegaConf.select(config, f"data.params.{name}")
        target = dataset.get("target") if OmegaConf.is_dict(dataset) else None
        known = (parameters_of(get_obj_from_str(str(target)))[1] or []) if target else []
        if name == "validation" and "data_root" not in known:
            continue  # there is none, or it reads no folder
        if "concepts" not in known:
            raise InputError(
                f"concepts: data.params.{name}.target is {target}, which reads one folder; expected "
                "ldm.data.folder.CaptionedFolder"
            )
        OmegaConf.update(config, f"data.params.{name}.params.concepts", folders, merge=False, force_add=True)


def tell_of_adapters(first: tuple[Any, DictConfig], second: tuple[Any, DictConfig]) -> None:
    """Say which position adapters win where two configs (name, content) have some."""
    kinds = [OmegaConf.select(one, f"{unet_params(one)}.adapter_config") or {} for _, one in (first, second)]
    earlier, later = ({kind for kind, entry in one.items() if entry} for one in kinds)
    for kind in sorted(later & earlier):
        if kinds[0][kind] != kinds[1][kind]:
            log.warning("%s: the adapters of %s replace those of the config before it", kind, second[0])
    if later and earlier - later:
        kept = ", ".join(sorted(earlier - later))
        log.warning("%s: those of the first config stay beside those of %s", kept, second[0])


def check_config(config: DictConfig) -> None:
    """Raises `InputError` for misspelt keys, wrong types and wrong arguments; logs keys without effect."""
    content = plain(config)
    check(content)
    check_entries(content)
    for dotted in schema.unused(content):
        log.info("%s has no effect", dotted)


def opened(
    options: argparse.Namespace, overrides: list[str], trainer_options: Mapping[str, Any] | None = None
) -> tuple[DictConfig, Path | None, Path | None]:
    """The config that the options name; if they resume a run, also its folder and its checkpoint.

    `trainer_options` are those of the command line; a schedule ends at their `max_steps`.
    """
    if options.resume and options.name:
        raise InputError("-r resumes a run, which has a name already; leave -n out")
    folder, checkpoint = resumed_folder(options.resume) if options.resume else (None, None)
    steps = (trainer_options or {}).get("max_steps")
    length = [] if steps is None else [f"lightning.trainer.max_steps={steps}"]
    options.base = [automatic(options.actual_resume) if path == AUTO else path for path in options.base]
    return read_configs(options.base, [*overrides, *length], folder, options), folder, checkpoint


def automatic(ckpt: str | None) -> str:
    """The config for training on a checkpoint, by what it is: `--base auto`. Raises `InputError`."""
    if not ckpt:
        raise InputError("--base auto needs --actual_resume, the checkpoint whose kind decides")
    base = known_base(ckpt)
    if not base.trained_by:
        raise InputError(f"{ckpt} is {base.what}: no config trains it, see docs/bases.md")
    log.info("%s is %s: --base %s", ckpt, base.what, base.trained_by)
    if base.note:
        log.warning("%s: %s", ckpt, base.note)
    return base.trained_by


def with_trainer(config: DictConfig, gpus: str | None, options: dict[str, Any]) -> DictConfig:
    """The config with the Trainer options of the command line, whose devices replace those of the config."""
    if gpus is not None:
        options = options | {"gpus": gpus}
    elif {"accelerator", "devices"} & options.keys() and OmegaConf.select(config, "lightning.trainer.gpus") is not None:
        options = options | {"gpus": None}
    refuse_no_text(plain(config))
    return OmegaConf.merge(config, {"lightning": {"trainer": options}}) if options else config


def refuse_no_text(config: Any) -> None:
    """Raises `InputError` for text that is not valid Unicode, such as file names in another encoding than UTF-8.

    A run stores its config as YAML, which cannot hold them.
    """
    if isinstance(config, (Mapping, list, tuple)):
        for value in config.values() if isinstance(config, Mapping) else config:
            refuse_no_text(value)
    elif isinstance(config, str) and (shown := printable(config)) != config:
        raise InputError(
            f"{shown!r} is not UTF-8, so the config of the run cannot be stored: rename it, or use a link to it"
        )
