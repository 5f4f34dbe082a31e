"""The data section of a config as data loaders. A batch depends only on the seed and on its number."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldm.config import instantiate_from_config
from ldm.data.custom import Concepts
from ldm.data.dreambooth import DreamBoothPairs
from ldm.data.sampling import ResumableBatches, SharedBatches, as_samples
from ldm.errors import InputError, short


class DataModuleFromConfig(pl.LightningDataModule):
    """`train`, `reg` (class pictures, paired with those of `train`), `validation` and `test`, each `{target, params}`.

    `train` may be a list, and `train2` (Custom Diffusion's name for it) its second entry: concepts learnt together.

    Batches are counted over the whole run, so a resumed run continues with the next one. With several processes, each
    one gets its own part of every batch; `batch_size` is the size of one part. Raises `InputError`.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping | Sequence[Mapping] | None = None,
        train2: Mapping | None = None,
        reg: Mapping | None = None,
        validation: Mapping | None = None,
        test: Mapping | None = None,
        wrap: bool = False,  # LDM's switch for the length of small datasets; draws have no end here
        num_workers: int | None = None,
        num_val_workers: int | None = None,  # unused; accepted because published YAML files have it
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"data.params.batch_size must be a whole number of at least 1, got {batch_size!r}")
        if not (num_workers is None or isinstance(num_workers, int) and num_workers >= 0):
            raise InputError(f"data.params.num_workers must be a whole number of at least 0, got {num_workers!r}")
        self.batch_size, self.seed = batch_size, seed
        self.num_workers = min(2 * batch_size, os.cpu_count() or 1) if num_workers is None else num_workers
        together = [*(train if isinstance(train, Sequence) else [train]), train2]
        self.concepts = [config for config in together if config is not None]
        if len(self.concepts) > 1 and reg is not None:
            raise InputError("data.params.reg is for one concept; several have class pictures of their own")
        self.configs = {"reg": reg, "validation": validation, "test": test}
        self.datasets: dict[str, Dataset] = {}
        self.batches_done = 0
        self.per_epoch = 0  # batches
        self.was: Mapping[str, int] = {}  # the `state_dict` of the checkpoint that is resumed

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets, once."""
        if self.concepts and "train" not in self.datasets:
            concepts = [instantiate_from_config(config) for config in self.concepts]
            self.datasets["train"] = concepts[0] if len(concepts) == 1 else Concepts(concepts)
        for name, config in self.configs.items():
            if config is not None and name not in self.datasets:
                self.datasets[name] = instantiate_from_config(config)

    def captions(self, training: int = 0) -> list[str]:
        """A caption of the subject and one of its class, for sample pictures of one of several trainings."""
        if prompts := self._prompts("validation"):
            return prompts
        if hasattr(self.datasets["train"], "examples"):
            return self.datasets["train"].examples()
        items = [self.datasets[name][0] for name in ("train", "reg") if name in self.datasets]
        return [item["caption"] for item in items if "caption" in item]

    def photographs(self, number: int, training: int = 0) -> list[Tensor]:
        """Up to `number` training pictures [3, h, w] in [0, 1], for sheets; none if they are not from files."""
        dataset = self.datasets.get("train")
        dataset = getattr(dataset, "dataset", dataset)  # pictures may have been encoded
        if not hasattr(dataset, "picture") or not hasattr(dataset, "paths"):
            return []
        shown = range(min(number, len(dataset.paths)))
        return [(dataset.picture(n, False).permute(2, 0, 1) + 1) / 2 for n in shown]

    def _prompts(self, name: str) -> list[str]:
        """The prompts of a set that has nothing else (`ldm.data.simple.TextOnly`); it gives no loss."""
        return getattr(self.datasets.get(name), "prompts", [])

    def train_dataloader(self) -> DataLoader:
        return self.batches_of(self.draws())

    def draws(self) -> Dataset:
        """The training set as an endless sequence of draws; with class pictures, each draw is a pair."""
        step = self.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        sets = [one_shape_for_each(self.datasets[name], step) for name in ("train", "reg") if name in self.datasets]
        train, *reg = (as_samples(one, self.seed) for one in sets)
        return DreamBoothPairs(train, *reg) if reg else train

    def batches_of(self, draws: Dataset) -> DataLoader:
        """Endless batches of draws, beginning after the batches that were drawn before."""
        world = self.trainer.world_size
        self.per_epoch = self._limited(self._whole_steps(len(draws) // (self.batch_size * world)))
        self._check_resumed()
        batches = ResumableBatches(
            self.batch_size,
            start_batch=self.batches_done,
            batches_per_epoch=self.per_epoch,
            rank=self.trainer.global_rank,
            world_size=world,
        )
        return self._loader(draws, batch_sampler=batches)

    def _check_resumed(self) -> None:
        """Raises `InputError` if a resumed run would not see the batches that follow those it has seen.

        The number of processes may change if all processes together see the same pictures.
        """
        now = self.state_dict()
        was = now | self.was  # checkpoints of earlier versions say only how many batches were done
        size, processes = "batch_size", "processes"
        if was[size] * was[processes] != now[size] * now[processes] or was["accumulated"] != now["accumulated"]:
            raise InputError(
                f"the run had steps of {was[processes]} processes x batches of {was[size]} x {was['accumulated']} "
                f"accumulated, now {now[processes]} x {now[size]} x {now['accumulated']}: a resume needs as many "
                "pictures in a batch of all processes; set data.params.batch_size, or start a new run"
            )
        if was["per_epoch"] != now["per_epoch"]:
            raise InputError(
                f"its epochs had {was['per_epoch']} batches, now {now['per_epoch']}: the pictures, their "
                "repeats or --limit_train_batches are others; set them back, or start a new run"
            )

    def _whole_steps(self, batches: int) -> int:
        """The number of batches rounded down to whole optimizer steps, but at least one step."""
        each = self.trainer.accumulate_grad_batches
        return max(each, batches // each * each)

    def _limited(self, batches: int) -> int:
        """The number of batches of an epoch under --limit_train_batches. It also removes that limit from the Trainer.

        Otherwise Lightning would end each epoch early, and the sampler would not know and repeat the same epoch.
        """
        limit, self.trainer.limit_train_batches = self.trainer.limit_train_batches, 1.0
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def val_dataloader(self) -> DataLoader | list:
        return self._finite("validation")

    def test_dataloader(self) -> DataLoader | list:
        return self._finite("test")

    def _finite(self, name: str) -> DataLoader | list:
        """A loader that goes through a dataset once, in order; an empty one if the config has no such dataset."""
        if name not in self.datasets or self._prompts(name):
            return []
        world, rank = self.trainer.world_size, self.trainer.global_rank
        dataset = one_shape_for_each(self.datasets[name], self.batch_size * world)
        return self._loader(dataset, batch_sampler=SharedBatches(len(dataset), self.batch_size, rank, world))

    def _loader(self, dataset: Dataset, **how: Any) -> DataLoader:
        return DataLoader(
            dataset,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else epochs would advance the training's generator
            **how,
        )

    def state_dict(self) -> dict[str, int]:
        return {
            "batches_done": self.trainer.fit_loop.epoch_loop.batch_progress.total.ready,
            "processes": self.trainer.world_size,
            "batch_size": self.batch_size,
            "accumulated": self.trainer.accumulate_grad_batches,
            "per_epoch": self.per_epoch,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        done = state.get("batches_done") if isinstance(state, Mapping) else None
        if not isinstance(done, int) or any(not isinstance(value, int) or value < 0 for value in state.values()):
            raise InputError(f"the checkpoint is damaged: the state of its data is {short(state)}: no batches_done")
        self.batches_done, self.was = done, state


def one_shape_for_each(dataset: Dataset, number: int) -> Dataset:
    """The same dataset; if its pictures have several shapes, each `number` of draws has one from now on."""
    if hasattr(dataset, "group_by"):
        dataset.group_by(number)
    return dataset
