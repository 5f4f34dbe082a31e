"""Several DreamBooth trainings at once on one copy of the frozen base, with one call of the UNet for all of them.

Each training has its own pictures, random numbers, learning rate and part of the batch. So its adapters are the same,
up to rounding, as if it had run alone.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.config import instantiate_from_config, override, plain, stored_config, unet_params
from ldm.errors import InputError
from ldm.interchange.base_choice import Choice
from ldm.models.building import untuned_model
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.train import dreambooth, run_folder
from ldm.train import run as runs
from ldm.train.datamodule import DataModuleFromConfig
from ldm.train.options import TRAINER_OPTIONS, dreambooth_parser
from ldm.train.run_config import check_config, with_trainer
from ldm.train.run_folder import Run
from ldm.tuning import UNET, Tuning, freeze_rest
from ldm.tuning.side_by_side import join, own_copies, view

# Options that a resume may change.
RESUMES = ("resume", "train", "debug", "gpus", "trust_config", "allow_family", *TRAINER_OPTIONS)

# Parameters of models that choose what is tuned. Trainings side by side may differ in them.
TUNING = ("train_level", "tuning", "freeze_model", "add_token", "init_word")
MOST_OF_THE_UNET = 0.5  # a training that changes a larger fraction of the UNet leaves little to share


def side_by_side(base: LatentDiffusion, parts: Sequence[Run]) -> LatentDiffusion:
    """One model that trains all of `parts` and shares the weights of `base`.

    Raises `InputError` for a training that changes most of the UNet's own weights.
    """
    views = [tuned_view(base, part) for part in parts]
    together = view(base)
    join(together.model, [one.model for one in views])
    together.train_side_by_side(views, [part.seed for part in parts])
    return together


def tuned_view(base: LatentDiffusion, part: Run) -> LatentDiffusion:
    """A view of the base with the families of one training's config installed."""
    with torch.device("meta"):
        plan = untuned_model(part.config)
    if plan.use_ema:
        raise InputError(f"{part.folder.name}: use_ema averages one whole model: train it alone, or set use_ema: false")
    torch.manual_seed(part.seed)  # adapters start at random numbers
    one = view(base)
    one.is_tuned, one.reg_weight = plan.is_tuned, plan.reg_weight
    one.tuning = Tuning(one, plan.tuning.families)
    one.tuning.install()
    own = [name for name in one.tuning.parameters() if one.tuning.is_base(name)]
    sizes = {name: value.numel() for name, value in base.model.named_parameters()}
    changed = sum(sizes[name.removeprefix("model.")] for name in own if name.startswith(UNET))
    if changed > MOST_OF_THE_UNET * sum(sizes.values()):
        raise InputError(
            f"{part.folder.name}: {100 * changed / sum(sizes.values()):.0f} % of the UNet's own weights learn, so that "
            "trainings side by side would share next to nothing; train it alone"
        )
    own_copies(one, own)
    freeze_rest(one, one.trainable_parameters())
    return one.train()


class SideBySide(Dataset):
    """Sample k of every set, as a tuple."""

    def __init__(self, sets: Sequence[Dataset]) -> None:
        self.sets = sets

    def __len__(self) -> int:
        return min(map(len, self.sets))

    def __getitem__(self, k: int) -> tuple:
        return tuple(pairs[k] for pairs in self.sets)


class ManyData(DataModuleFromConfig):
    """The pictures of several trainings."""

    def __init__(self, parts: Sequence[DataModuleFromConfig]) -> None:
        super().__init__(parts[0].batch_size, num_workers=parts[0].num_workers, seed=parts[0].seed)
        self.parts = parts

    def setup(self, stage: str | None = None) -> None:
        for number, part in enumerate(self.parts):
            part.setup(stage)
            for name in ("train", "reg"):
                if getattr(part.datasets.get(name), "shapes", None):
                    raise InputError("trainings side by side compute together what has one shape; train buckets alone")
                if name in part.datasets:
                    self.datasets.setdefault(f"{name} {number}", part.datasets[name])

    def captions(self, training: int = 0) -> list[str]:
        return self.parts[training].captions()

    def photographs(self, number: int, training: int = 0) -> list[Tensor]:
        return self.parts[training].photographs(number)

    def train_dataloader(self) -> DataLoader:
        for number, part in enumerate(self.parts):  # the cache may have replaced their datasets
            names = {name: f"{name} {number}" for name in ("train", "reg")}
            part.datasets |= {name: self.datasets[own] for name, own in names.items() if own in self.datasets}
            part.trainer = self.trainer
        return self.batches_of(SideBySide([part.draws() for part in self.parts]))


def without(config: DictConfig) -> dict[str, Any]:
    """What all trainings must have in common: the model without its tuning, and the settings of the run."""
    common = copy.deepcopy(plain(config))
    params = common["model"]["params"]
    for name in TUNING:
        params.pop(name, None)
    params[unet_params(common).split(".")[2]]["params"].pop("adapter_config", None)
    if isinstance(params.get("cond_stage_config"), dict):
        (params["cond_stage_config"].get("params") or {}).pop("modifier_token", None)
    common["model"].pop("base_learning_rate", None)
    shared = {key: common["dreambooth"].get(key) for key in ("base", "cache", "base_precision")}
    shared["parts of the base"] = asdict(Choice.of(config))
    data, trainer = common["data"]["params"], plain(OmegaConf.select(config, "lightning.trainer"))
    shared |= {"batch_size": data["batch_size"], "class pictures": data.get("reg") is not None, "trainer": trainer}
    return {"model": common["model"], **shared}


def plan(options: argparse.Namespace, trainer_options: dict[str, Any], overrides: list[str]) -> tuple[list[Run], Path]:
    """A run for every config on every subject, and the folder that holds them. Raises `InputError`."""
    planned = _resumed if options.resume else _new
    return planned(options, trainer_options, overrides)


def _resumed(
    options: argparse.Namespace, trainer_options: dict[str, Any], overrides: list[str]
) -> tuple[list[Run], Path]:
    folder = Path(options.resume)
    stored = sorted(folder.glob("*/configs/project.yaml"))
    if not stored or not (folder / "checkpoints" / "last.ckpt").is_file():
        raise InputError(f"cannot resume {folder}: expected a folder of train_many.py with checkpoints/last.ckpt")
    usual = dreambooth_parser("", several=True).get_default
    if asked := [name for name, value in vars(options).items() if name not in RESUMES and value != usual(name)]:
        raise InputError(f"-r goes on with trainings as they are stored; leave --{', --'.join(asked)} out")
    configs = [override(stored_config(path), overrides) for path in stored]
    for config in configs:
        check_config(config)
    configs = [with_trainer(config, options.gpus, trainer_options) for config in configs]
    return [
        dreambooth.as_run(config, path.parent.parent, debug=options.debug)
        for config, path in zip(configs, stored, strict=True)
    ], folder


def _new(options: argparse.Namespace, trainer_options: dict[str, Any], overrides: list[str]) -> tuple[list[Run], Path]:
    if not options.base or not options.data_root:
        raise InputError("nothing to train: name configs with --base and folders of photographs with --data_root")
    columns = [_for_each(options, name) for name in ("data_root", "reg_data_root", "class_word")]
    folder = run_folder.new_folder(options.logdir, options.project, "", options.name or "many", options.postfix)
    parts = []
    for config, (data, reg, word) in itertools.product(options.base, zip(*columns, strict=True)):
        own = argparse.Namespace(**vars(options))
        own.base, own.data_root, own.reg_data_root, own.class_word = [config], data, reg, word
        part = dreambooth.plan(own, trainer_options, overrides)
        part.folder = folder / f"{len(parts):03}_{Path(config).stem}_{Path(data).resolve().name}"
        parts.append(part)
    return parts, folder


def _for_each(options: argparse.Namespace, name: str) -> list[str | None]:
    """One value for each subject; a single value is used for all of them."""
    values, count = getattr(options, name) or [None], len(options.data_root)
    if len(values) not in (1, count):
        raise InputError(
            f"{len(values)} times --{name} for {count} times --data_root; give one for each, or one for all"
        )
    return values if len(values) == count else values * count


def class_folders(parts: list[Run]) -> list[tuple[Run, Path, str]]:
    """The folders of class pictures to fill, each once. Raises `InputError` if a folder would hold two classes."""
    found: dict[Path, tuple[Run, str]] = {}
    for part in parts:
        for folder, caption in dreambooth.class_folders(part.config):
            _, other = found.setdefault(folder, (part, caption))
            if other != caption:
                raise InputError(f"{folder} would be filled with {other!r} and with {caption!r}; name two folders")
    return [(part, folder, caption) for folder, (part, caption) in found.items()]


def finished(parts: list[Run], folder: Path) -> str | None:
    """A line that says that resumed trainings have already reached their end; None if they have not."""
    last = folder / "checkpoints" / "last.ckpt"
    return run_folder.finished(replace(parts[0], folder=folder, resume=last)) if last.is_file() else None


def train(
    parts: list[Run], folder: Path, num_class_images: int = 0, base: LatentDiffusion | None = None
) -> pl.Trainer:
    """Train all of `parts`, whose folders lie in `folder`; first fill their folders of class pictures.

    `base` is their base model without tuning, if the caller has it already. Raises `InputError` if the trainings have
    different bases.
    """
    first = parts[0]
    lacking = class_folders(parts) if num_class_images else []
    common = without(first.config)
    for part in parts[1:]:
        if differing := [key for key, value in without(part.config).items() if value != common[key]]:
            names = f"{part.folder.name} and {first.folder.name}"
            raise InputError(
                f"{names} differ in more than their tuning, pictures and learning rates: {', '.join(differing)}"
            )
    last = folder / "checkpoints" / "last.ckpt"
    group = Run(
        config=first.config, folder=folder, base=first.base, resume=last if last.is_file() else None, seed=first.seed,
        debug=first.debug, base_precision=first.base_precision, cache=first.cache, keep_memory=first.keep_memory,
        parts=parts,
    )  # fmt: skip
    with runs.before_the_first_step():
        base = base or runs.base_model(group, tuned=False)
        for part, pictures, caption in lacking:
            runs.prepare_class_pictures(part, base, pictures, caption, num_class_images)
        module = side_by_side(base, parts)
    folder.mkdir(parents=True, exist_ok=True)
    data = ManyData([instantiate_from_config(part.config.data) for part in parts])
    places = [(part.checkpoints, part.notes) for part in parts]
    saver = runs.saver_of(group, places)
    with runs.unless_refused(group, saver):
        return runs.fit(group, module, data, saver)
