"""Several DreamBooth trainings at once over one copy of the frozen base, with one call of the UNet for all of them.

Each training has its own pictures, random draws, learning rate and share of the batch, so that its adapters become what
they would have become alone, up to rounding.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.config import get_obj_from_str, instantiate_from_config, override, plain, stored_config
from ldm.data.dreambooth import DreamBoothPairs
from ldm.errors import InputError
from ldm.models.diffusion.draws import Stream
from ldm.models.diffusion.losses import dreambooth_loss
from ldm.modules import adapter_files
from ldm.modules.adapters import read_adapter_config
from ldm.modules.attention import BasicTransformerBlock
from ldm.modules.diffusionmodules.openaimodel import ResBlock
from ldm.modules.folders import write_folder
from ldm.modules.shares import attach_shares
from ldm.train import dreambooth
from ldm.train import run as runs
from ldm.train.callbacks import ImageLogger
from ldm.train.datamodule import DataModuleFromConfig
from ldm.train.options import TRAINER_OPTIONS, dreambooth_parser
from ldm.train.resume import SaveRun
from ldm.train.run import Run

BLOCKS = {"transformer_adp_config": BasicTransformerBlock, "resblock_adp_config": ResBlock}
ADAPTERS = "model.params.unet_config.params.adapter_config"
# what a resume may say anew
RESUMES = ("resume", "train", "debug", "gpus", "trust_config", "allow_family", *TRAINER_OPTIONS)


class ManyRuns(pl.LightningModule):
    """K trainings as one module: `model` is the base, `configs` the adapters of each of `parts`."""

    strict_loading = False
    is_tuned = False  # folders are written for each training, see `SaveMany`

    def __init__(self, model: Any, configs: Sequence[dict], parts: Sequence[Run]) -> None:
        super().__init__()
        self.model, self.parts = model, parts
        self.names = attach_shares(model.model.diffusion_model, configs, [part.seed for part in parts])
        model.requires_grad_(False)
        for own in self.own():
            for parameter in own.values():
                parameter.requires_grad_(True)

    def setup(self, stage: str) -> None:
        """Each draws what it would draw alone."""
        self.streams = [Stream(part.seed) for part in self.parts]

    def own(self) -> list[dict[str, nn.Parameter]]:
        """What each training lets learn, by the names that it would have alone."""
        parameters = dict(self.model.model.diffusion_model.named_parameters())
        return [{alone: parameters[here] for here, alone in names.items()} for names in self.names]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        drawn = []
        for stream, pair in zip(self.streams, batch, strict=True):
            with stream.drawing_from(self.device), self.model.sharing(self._trainer, batch_idx, stream.draws):
                drawn += [self.model.draw(part) for part in pair]
        losses = iter(self.model.losses_of(drawn))
        total = torch.zeros((), device=self.device)
        for number, pair in enumerate(batch):
            (loss, _), *prior = [next(losses) for _ in pair]
            self.log(f"train/loss_{number}", loss, batch_size=1, sync_dist=self.trainer.world_size > 1)
            for prior_loss, _ in prior:
                loss = dreambooth_loss(loss, prior_loss, self.model.reg_weight)
            total = total + loss
        self.log("loss", total.detach() / len(batch), prog_bar=True, logger=False, batch_size=1)
        return total

    def learning(self) -> dict[str, nn.Parameter]:
        return {f"{number}.{name}": p for number, own in enumerate(self.own()) for name, p in own.items()}

    def configure_optimizers(self) -> Any:
        rates = [runs.learning_rate(part, self.trainer.world_size) for part in self.parts]
        groups = [{"params": list(own.values()), "lr": rate} for own, rate in zip(self.own(), rates, strict=True)]
        return self.model.optimizers_of(groups, rates[0])

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Each training by itself: the norm of one is no other's."""
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        for group in optimizer.param_groups if gradient_clip_val else []:
            clip(group["params"], gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: p.detach() for name, p in self.learning().items()}

    def load_state_dict(self, state: dict[str, Tensor], **_: Any) -> None:
        with torch.no_grad():
            for name, parameter in self.learning().items():
                parameter.copy_(state[name])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if checkpoint["state_dict"].keys() != self.learning().keys():
            raise InputError("the checkpoint is of other trainings; resume with the same configs and subjects")


class SideBySide(Dataset):
    """Draw k of every set, as a tuple."""

    def __init__(self, sets: Sequence[DreamBoothPairs]) -> None:
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
        if self.datasets:
            return
        for number, part in enumerate(self.parts):
            part.setup(stage)
            for name in ("train", "reg"):
                if name in part.datasets:
                    self.datasets[f"{name} {number}"] = part.datasets[name]

    def train_dataloader(self) -> DataLoader:
        sets = [
            DreamBoothPairs(self.datasets[f"train {number}"], self.datasets.get(f"reg {number}"))
            for number in range(len(self.parts))
        ]
        return self.batches_of(SideBySide(sets))


class SaveMany(SaveRun):
    """Writes a folder of adapters for each training, and one `last.ckpt` for all."""

    def __init__(self, parts: Sequence[Run], folder: Path, every_n_train_steps: int) -> None:
        super().__init__(folder, every_n_train_steps)
        self.parts = parts

    def save_folders(self, module: ManyRuns) -> None:
        for part, own in zip(self.parts, module.own(), strict=True):
            self._write(part, module.model.model.diffusion_model, own)

    def _write(self, part: Run, unet: nn.Module, own: dict[str, nn.Parameter]) -> None:
        told = adapter_files.about(unet, entries_of(adapters_of(part.config), own), {"step": self.step, **part.notes})
        write_folder(part.checkpoints / f"{self.step}-adapters", told, own)


def entries_of(config: dict[str, list[dict]], own: dict[str, Any]) -> list[dict[str, Any]]:
    """The adapters of one training as `adapter_files.describe` would tell them if it were alone."""
    told = []
    for kind, entries in config.items():
        for place, entry in enumerate(entries):
            name = BLOCKS[kind].adapter_name(place)
            blocks = list(dict.fromkeys(key.split(f".{name}.")[0] for key in own if f".{name}." in key))
            entry = {key: value for key, value in entry.items() if key != "type"}
            told.append({"kind": kind, "name": name, **entry, "blocks": blocks})
    return told


def adapters_of(config: DictConfig) -> dict[str, list[dict]]:
    """The checked adapters of a training's config. Raises `InputError` if it tunes anything else."""
    params = config.model.params
    levels = plain(params.get("train_level")) or []
    if (levels if isinstance(levels, list) else [levels]) != ["adapter"] or params.get("tuning"):
        raise InputError("only position adapters train side by side: train_level must be [adapter], without tuning")
    adapters = read_adapter_config(OmegaConf.select(config, ADAPTERS))
    if not adapters:
        raise InputError("a config without adapter_config has nothing to train; name a configs/*/<input>-<output>.yaml")
    return adapters


def without(config: DictConfig) -> dict[str, Any]:
    """What all trainings must have in common: the model but for its adapters, and how it is trained."""
    common = copy.deepcopy(plain(config))
    common["model"]["params"]["unet_config"]["params"].pop("adapter_config", None)
    common["model"].pop("base_learning_rate", None)
    told = {key: common["dreambooth"].get(key) for key in ("base", "cache", "base_precision")}
    data, trainer = common["data"]["params"], plain(OmegaConf.select(config, "lightning.trainer"))
    told |= {"batch_size": data["batch_size"], "class pictures": data.get("reg") is not None, "trainer": trainer}
    return {"model": common["model"], **told}


def without_pictures(config: DictConfig) -> None:
    """Take out the image logger: it draws with one model, and here a forward pass is of all adapters at once."""
    callbacks = OmegaConf.select(config, "lightning.callbacks") or {}
    for name, callback in callbacks.items():
        if callback and get_obj_from_str(callback.target) is ImageLogger:
            callbacks[name] = None


def plan(options: argparse.Namespace, trainer_options: dict[str, Any], overrides: list[str]) -> tuple[list[Run], Path]:
    """Every config on every subject, and the folder that they lie in. Raises `InputError`."""
    if options.resume:
        folder = Path(options.resume)
        stored = sorted(folder.glob("*/configs/project.yaml"))
        if not stored or not (folder / "checkpoints" / "last.ckpt").is_file():
            raise InputError(f"cannot resume {folder}: expected a folder of train_many.py with checkpoints/last.ckpt")
        usual = dreambooth_parser("", several=True).get_default
        if asked := [name for name, value in vars(options).items() if name not in RESUMES and value != usual(name)]:
            raise InputError(f"-r goes on with trainings as they are stored; leave --{', --'.join(asked)} out")
        configs = [override(stored_config(path), overrides) for path in stored]
        for config in configs:
            runs.check_config(config)
        configs = [runs.with_trainer(config, options.gpus, trainer_options) for config in configs]
        return [
            dreambooth.as_run(config, path.parent.parent, debug=options.debug)
            for config, path in zip(configs, stored, strict=True)
        ], folder
    if not options.base or not options.data_root:
        raise InputError("nothing to train: name configs with --base and folders of photographs with --data_root")
    subjects = list(
        zip(*(_for_each(options, name) for name in ("data_root", "reg_data_root", "class_word")), strict=True)
    )
    folder = runs.new_folder(options.logdir, options.project, "", options.name or "many", options.postfix)
    parts = []
    for config in options.base:
        for data, reg, word in subjects:
            own = argparse.Namespace(**vars(options))
            own.base, own.data_root, own.reg_data_root, own.class_word = [config], data, reg, word
            part = dreambooth.plan(own, trainer_options, overrides)
            part.folder = folder / f"{len(parts):03}_{Path(config).stem}_{Path(data).resolve().name}"
            parts.append(part)
    return parts, folder


def _for_each(options: argparse.Namespace, name: str) -> list[str | None]:
    """One value for each subject: as many as there are, or the only one for all."""
    values, count = getattr(options, name) or [None], len(options.data_root)
    if len(values) not in (1, count):
        raise InputError(
            f"{len(values)} times --{name} for {count} times --data_root; give one for each, or one for all"
        )
    return values if len(values) == count else values * count


def class_folders(parts: list[Run]) -> list[tuple[Run, Path, str]]:
    """The folders of class pictures to fill, once each. Raises `InputError` for one that is to hold two classes."""
    found: dict[Path, tuple[Run, str]] = {}
    for part in parts:
        for folder, caption in dreambooth.class_folders(part.config):
            _, other = found.setdefault(folder, (part, caption))
            if other != caption:
                raise InputError(f"{folder} would be filled with {other!r} and with {caption!r}; name two folders")
    return [(part, folder, caption) for folder, (part, caption) in found.items()]


def finished(parts: list[Run], folder: Path) -> str | None:
    """The line that says so, where trainings that are to go on have reached their end already."""
    last = folder / "checkpoints" / "last.ckpt"
    return runs.finished(replace(parts[0], folder=folder, resume=last)) if last.is_file() else None


def train(parts: list[Run], folder: Path, num_class_images: int = 0) -> pl.Trainer:
    """Train all of `parts`, whose folders lie in `folder`, on at least so many class pictures in each of theirs.

    Raises `InputError` if they do not have one base.
    """
    first = parts[0]
    lacking = class_folders(parts) if num_class_images else []
    configs = [adapters_of(part.config) for part in parts]
    common = without(first.config)
    for part in parts[1:]:
        if differing := [key for key, value in without(part.config).items() if value != common[key]]:
            names = f"{part.folder.name} and {first.folder.name}"
            raise InputError(
                f"{names} differ in more than adapters, pictures and learning rates: {', '.join(differing)}"
            )
    shared = copy.deepcopy(first.config)
    OmegaConf.update(shared, ADAPTERS, None, merge=False)
    without_pictures(shared)
    last = folder / "checkpoints" / "last.ckpt"
    group = Run(
        config=shared, folder=folder, base=first.base, resume=last if last.is_file() else None, seed=first.seed,
        debug=first.debug, base_precision=first.base_precision, cache=first.cache, keep_memory=first.keep_memory,
        parts=parts,
    )  # fmt: skip
    with runs.before_the_first_step():
        model = runs.base_model(group)
        for part, pictures, caption in lacking:
            runs.prepare_class_pictures(part, model, pictures, caption, num_class_images)
    folder.mkdir(parents=True, exist_ok=True)
    module = ManyRuns(model, configs, parts)
    data = ManyData([instantiate_from_config(part.config.data) for part in parts])
    saver = SaveMany(parts, group.checkpoints, runs.checkpoint_every(first.config))
    with runs.unless_refused(group, saver):
        return runs.fit(group, module, data, base=model, saver=saver)
