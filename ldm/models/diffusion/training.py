"""Training of diffusion models with Lightning: one training, or several side by side on one base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.config import instantiate_from_config
from ldm.devices import forked_rng
from ldm.errors import InputError
from ldm.lightning import module_class
from ldm.models.diffusion.draws import Draws, SharedDraws, Stream, rows_of_step
from ldm.models.diffusion.losses import dreambooth_loss
from ldm.tuning import UNET
from ldm.tuning.side_by_side import SplitBatch

if TYPE_CHECKING:
    import pytorch_lightning as pl


class DiffusionTraining(module_class()):
    """Lightning's hooks for the training of a diffusion model.

    `trainings` are the trained models: the model itself, or `views` of one base that it computes in one call
    (`ldm.tuning.side_by_side`). Each one has its own random numbers, learning rate, families, weight of the class
    pictures and part of the batch, so its result is the same, up to rounding, as if it were trained alone.
    """

    reg_weight = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.views: nn.ModuleList | tuple = ()
        self.streams: Sequence[Stream] = ()  # random numbers besides those of the process; the run sets them
        self.draws, self._shared, self._sums = Draws(), SharedDraws(), {}

    @property
    def trainings(self) -> list[DiffusionTraining]:
        return list(self.views) or [self]

    def train_side_by_side(self, views: Sequence[DiffusionTraining], seeds: Sequence[int]) -> None:
        """Train `views`, which this model computes together, each with the random numbers of its seed."""
        self.views = nn.ModuleList(views)
        for one, seed in zip(views, seeds, strict=True):
            one.streams = [Stream(seed)]
        self.streams = [one.streams[0] for one in views]
        for module in self.modules():
            if isinstance(module, SplitBatch):
                module.drawing = [stream.drawing_from for stream in self.streams]

    # --- the random numbers of a step

    @contextmanager
    def drawing(self, draws: Draws) -> Iterator[None]:
        """Within this context, random numbers come from `draws`."""
        usual, self.draws = self.draws, draws
        try:
            yield
        finally:
            self.draws = usual

    def sharing(self, trainer: pl.Trainer | None, batch_idx: int) -> AbstractContextManager:
        """`drawing` the rows of a training batch that is one of several in a step."""
        processes, batches = (trainer.world_size, trainer.accumulate_grad_batches) if trainer else (1, 1)
        if processes * batches == 1:
            return nullcontext()
        place = batch_idx % batches
        self._shared.begin(rows_of_step(trainer.global_rank, processes, place, batches), is_first=place == 0)
        return self.drawing(self._shared)

    def drawn(self, batches: Sequence[Mapping[str, Any]], device: torch.device) -> list[Drawn]:
        """x_0, condition, steps, noise and x_t of each batch; in training, from the model's stream if it has one."""
        own = self.streams[0].drawing_from(device) if self.streams and self.training else nullcontext()
        with own:
            return [self.draw(batch) for batch in batches]

    # --- steps

    def masks_of(self, batches: Sequence[Mapping[str, Any]], drawn: Sequence[Drawn]) -> list[Tensor | None]:
        """For each batch, the mask that weights its loss, in the size of its latents; None without a mask."""
        return [mask_of(batch, x.shape[2:]) for batch, (x, *_) in zip(batches, drawn, strict=True)]

    def losses(self, batches: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The loss of each batch, from one call of the UNet for all of them."""
        drawn = self.drawn(batches, self.device)
        return self.losses_of(drawn, self.masks_of(batches, drawn))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The sum of the losses of all trainings, for a batch or DreamBooth's pair [subject, class]
        (arXiv 2208.12242, eq. 2)."""
        parts = [as_pair(part) for part in (batch if self.views else [batch])]
        drawn, masks = [], []
        for one, pair in zip(self.trainings, parts, strict=True):
            with one.sharing(self._trainer, batch_idx):
                own = one.drawn(pair, self.device)
            drawn += own
            masks += one.masks_of(pair, own)
        answers = iter(self.losses_of(drawn, masks))
        values, losses = {}, []
        for number, (one, pair) in enumerate(zip(self.trainings, parts, strict=True)):
            (loss, logged), *prior = [next(answers) for _ in pair]
            logged = self._prefixed(logged)
            for prior_loss, _ in prior:
                logged["train/loss_prior"] = prior_loss
                loss = dreambooth_loss(loss, prior_loss, one.objective.prior_weight(self.global_step, one.reg_weight))
                logged["train/loss_with_prior"] = loss
            losses.append(loss)
            values |= {f"{name}_{number}" if self.views else name: value for name, value in logged.items()}
        total = sum(losses[1:], losses[0])
        *named, mean = self._means_of_step({**values, "loss": total / len(losses)}, batch_idx).items()
        size, several = len(drawn[0][0]), bool(self.streams)
        self.log_dict(dict(named), batch_size=size, sync_dist=several)
        self.log(*mean, prog_bar=True, logger=False, batch_size=1, sync_dist=several)
        return total

    def _means_of_step(self, values: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """The values to log, as means over the batches that are accumulated for this step so far."""
        values = {name: value.detach() for name, value in values.items()}
        batches = self._trainer.accumulate_grad_batches if self._trainer else 1
        if batches == 1:
            return values
        place = batch_idx % batches
        self._sums = {name: value + (self._sums[name] if place else 0) for name, value in values.items()}
        return {name: value / (place + 1) for name, value in self._sums.items()}

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs val/loss, and val/loss_ema with averaged weights if there are any, with fixed random numbers."""
        batch = batch[0] if isinstance(batch, (list, tuple)) else batch
        scopes = {"": nullcontext, "_ema": self.ema_scope} if self.use_ema else {"": nullcontext}
        for suffix, scope in scopes.items():
            with scope(), forked_rng(self.device, batch_idx), self._validating(batch_idx):
                [(_, parts)] = self.losses([batch])
            parts = {name + suffix: value for name, value in self._prefixed(parts).items()}
            size = len(batch[self.first_stage_key])
            self.log_dict(parts, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def _validating(self, batch_idx: int) -> AbstractContextManager:
        """`drawing` the rows of a validation batch that several processes share."""
        loader = self._trainer.val_dataloaders if self.streams else None
        share = getattr(getattr(loader, "batch_sampler", None), "rows", None)
        if share is None:
            return nullcontext()
        shared = SharedDraws()
        shared.begin(lambda _: share(batch_idx))
        return self.drawing(shared)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step of the optimizer, then an update of the averages, before any callback saves them."""
        step = self.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        for one in self.trainings:
            one.after_step(step, optimizer)
        if self.use_ema:
            self.model_ema(self.model)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        for one in self.trainings:
            one.rest(self.global_step)

    def configure_optimizers(self) -> Any:
        """AdamW, or the optimizer of `optimizer_config`, for the trainable parameters, each one once."""
        groups = [{"lr": one.learning_rate, **group} for one in self.trainings for group in one.parameter_groups()]
        if not groups:
            raise InputError("this config trains nothing: set model.params.train_level or model.params.tuning")
        return self.optimizers_of(groups, self.learning_rate)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradients of each training separately, because norms must not mix."""
        if not self.views:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        clip = nn.utils.clip_grad_value_ if gradient_clip_algorithm == "value" else nn.utils.clip_grad_norm_
        for one in self.views if gradient_clip_val else ():
            clip(list(one.trainable_parameters().values()), gradient_clip_val)

    def optimizers_of(self, groups: Sequence[Mapping[str, Any]], rate: float) -> Any:
        """The config's optimizer for groups of parameters, and its schedule if it has one, in Lightning's format."""
        if "lr" in (self.optimizer_config.get("params") or {}):
            raise InputError("optimizer_config.params.lr: the learning rate is model.base_learning_rate; set it there")
        optimizer = instantiate_from_config(self.optimizer_config, params=groups, lr=rate)
        later = [group.get("rate_from") for group in optimizer.param_groups]
        if self.scheduler_config is None and not any(later):
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config).schedule if self.scheduler_config else constant
        factors = [
            schedule if own is None else partial(changed_rate, schedule, own[0], own[1] / group["lr"])
            for own, group in zip(later, optimizer.param_groups, strict=True)
        ]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factors)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    # --- checkpoints hold only trained parameters; the base model stays in its own file

    strict_loading = False

    def saved(self, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The part of the model, or of `state`, for checkpoints: trained parameters, averages and a measured scale."""
        if self.views:
            return {f"{number}.{name}": p.detach() for number, one in enumerate(self.views)
                    for name, p in one.trainable_parameters().items()}  # fmt: skip
        learning = self.trainable_parameters()
        return {
            name: value
            for name, value in (self.state_dict() if state is None else state).items()
            if name in learning or name.startswith("model_ema.") or name == "scale_factor"
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.saved(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.views:
            checkpoint["state_dict"] = with_full_names(checkpoint["state_dict"])
        expected, found = self.saved(), checkpoint["state_dict"]
        differing = sorted(expected.keys() ^ found.keys())
        differing += [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
        if differing:
            raise InputError(
                f"the checkpoint is of another run: it differs in {len(differing)} tensors, e.g. {differing[0]}"
            )

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        if not self.views:
            return super().load_state_dict(state, strict, assign)
        with torch.no_grad():
            for number, one in enumerate(self.views):
                for name, parameter in one.trainable_parameters().items():
                    parameter.copy_(state[f"{number}.{name}"])


def constant(_: int) -> float:
    """The factor without a schedule."""
    return 1.0


def changed_rate(schedule: Callable[[int], float], first: int, ratio: float, step: int) -> float:
    """The factor of a group whose learning rate is multiplied by `ratio` from step `first` on."""
    return schedule(step) * (ratio if step >= first else 1.0)


Drawn = tuple[Tensor, Any, Tensor, Tensor, Tensor]  # x_0, condition, steps, noise, x_t


def as_pair(batch: Any) -> list[Mapping[str, Any]]:
    """A batch of the subject, and the batch of its class if there is one."""
    return list(batch) if isinstance(batch, (list, tuple)) else [batch]


def with_full_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Current names of trainings side by side. Earlier versions had only adapters, and names within the UNet."""
    split = {name: name.partition(".") for name in state}
    return {
        name if rest.startswith(("model.", "cond_stage_model.", "logvar")) else f"{number}.{UNET}{rest}": state[name]
        for name, (number, _, rest) in split.items()
    }


def mask_of(batch: Mapping[str, Any], size: torch.Size) -> Tensor | None:
    """The weights of the loss [b, 1, h, w] at each latent.

    From `loss_mask` [b, H, W], the mean of its pixels; from `mask` [b, H, W], 1 if all pixels of a latent are masked.
    """
    if "loss_mask" in batch:
        return nn.functional.adaptive_avg_pool2d(batch["loss_mask"].float()[:, None], tuple(size))
    if "mask" not in batch:
        return None
    mask = batch["mask"].float()
    return -nn.functional.adaptive_max_pool2d(-(mask if mask.dim() == 4 else mask[:, None]), tuple(size))
