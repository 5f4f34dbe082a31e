"""Denoising diffusion as a Lightning module, in the space of the batch itself (arXiv 2006.11239)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.checkpoints import is_added, read_weights
from ldm.config import instantiate_from_config
from ldm.devices import forked_rng
from ldm.errors import InputError
from ldm.models.building import load_weights
from ldm.models.diffusion.draws import Draws, SharedDraws, Stream, rows_of_step
from ldm.models.diffusion.guidance import batched
from ldm.models.diffusion.losses import diffusion_loss, dreambooth_loss, simple_loss
from ldm.models.diffusion.prediction import prediction
from ldm.models.diffusion.process import DiffusionProcess
from ldm.modules.ema import LitEma


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Contexts [b, m, d] as one; a single one stays the same tensor, by which `ldm.modules.text_once` knows it."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


# How each `conditioning_key` hands the condition to the UNet: (channels to append, context, class labels).
CONDITIONING = {
    None: lambda concat, cross: ([], None, None),
    "concat": lambda concat, cross: (concat, None, None),
    "crossattn": lambda concat, cross: ([], joined(cross), None),
    "hybrid": lambda concat, cross: (concat, joined(cross), None),
    "adm": lambda concat, cross: ([], None, cross[0]),
}


class DiffusionWrapper(nn.Module):
    """The UNet and the way in which the condition enters it."""

    def __init__(self, diff_model_config: Mapping, conditioning_key: str | None) -> None:
        super().__init__()
        if conditioning_key not in CONDITIONING:
            raise InputError(f"conditioning_key must be one of {list(CONDITIONING)}, got {conditioning_key!r}")
        self.diffusion_model = instantiate_from_config(diff_model_config)
        self.conditioning_key = conditioning_key

    def forward(
        self, x: Tensor, t: Tensor, c_concat: list[Tensor] | None = None, c_crossattn: list[Tensor] | None = None
    ) -> Tensor:
        channels, context, labels = CONDITIONING[self.conditioning_key](c_concat, c_crossattn)
        return self.diffusion_model(torch.cat([x, *channels], dim=1), t, context=context, y=labels)


class DDPM(DiffusionProcess, pl.LightningModule):
    """Denoising diffusion in the space of the batch itself. Constructor arguments and buffer names are LDM's.

    `learning_rate` is an attribute that the training run sets. `min_snr_gamma` weighs the steps by Min-SNR
    (arXiv 2303.09556, which recommends 5). Raises `InputError` for values that make no sense.
    """

    def __init__(
        self,
        unet_config: Mapping,
        timesteps: int = 1000,
        beta_schedule: str = "linear",
        loss_type: str = "l2",
        ckpt_path: str | None = None,
        monitor: str | None = "val/loss",
        use_ema: bool = True,
        first_stage_key: str = "image",
        image_size: int = 256,
        channels: int = 3,
        log_every_t: int = 100,
        linear_start: float = 1e-4,
        linear_end: float = 2e-2,
        cosine_s: float = 8e-3,
        given_betas: Any = None,
        original_elbo_weight: float = 0.0,
        v_posterior: float = 0.0,
        l_simple_weight: float = 1.0,
        conditioning_key: str | None = None,
        parameterization: str = "eps",
        scheduler_config: Mapping | None = None,
        optimizer_config: Mapping | None = None,
        learn_logvar: bool = False,
        logvar_init: float = 0.0,
        min_snr_gamma: float | None = None,
        mask_as_published: bool = False,  # see `ldm.models.diffusion.losses.simple_loss`
    ) -> None:
        super().__init__()
        self.prediction = prediction(parameterization)
        if loss_type not in ("l1", "l2"):
            raise InputError(f"loss_type must be l1 or l2, got {loss_type!r}")
        self.parameterization, self.loss_type, self.v_posterior = parameterization, loss_type, v_posterior
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise InputError(f"min_snr_gamma must be positive, got {min_snr_gamma}")
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        self.min_snr_gamma = min_snr_gamma
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
        self.log_every_t, self.learn_logvar, self.mask_as_published = log_every_t, learn_logvar, mask_as_published
        self.scheduler_config = scheduler_config
        self.optimizer_config = optimizer_config or {"target": "torch.optim.AdamW"}
        if monitor is not None:
            self.monitor = monitor
        self.model = DiffusionWrapper(unet_config, conditioning_key)
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.use_ema = use_ema
        self.draws = Draws()
        self.streams: list[Stream] = []  # where several processes draw together; the run sets it
        self._shared, self._sums = SharedDraws(), {}
        self._install(use_ema, ckpt_path)

    def _install(self, use_ema: bool, ckpt_path: str | None) -> None:
        """What comes after all parts are there."""
        if use_ema:
            self.model_ema = LitEma(self.model)
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path)

    def init_from_ckpt(self, path: str) -> None:
        """Load the weights of a checkpoint; what tuning added and the checkpoint lacks keeps its start."""
        load_weights(self, read_weights(path), source=str(path), may_lack=is_added)

    def weights_loaded(self, lacking: Set[str]) -> None:
        """Averages that a checkpoint lacks begin at the weights that it has; `load_weights` calls this."""
        if self.use_ema:
            self.model_ema.begin(self.model, {name.removeprefix("model_ema.") for name in lacking})

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within this context the UNet has its averaged weights, if averages are kept."""
        if not self.use_ema:
            yield
            return
        self.model_ema.store(self.model.parameters())
        self.model_ema.copy_to(self.model)
        try:
            yield
        finally:
            self.model_ema.restore(self.model.parameters())

    # --- the model and its loss

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """What the UNet predicts for x_t: the noise, x_0 or the velocity, as `parameterization` says.

        `cond`: a tensor, a list of tensors, or LDM's `{"c_concat": [...], "c_crossattn": [...]}`.
        """
        if not isinstance(cond, Mapping):
            cond = cond if isinstance(cond, Sequence) or cond is None else [cond]
            cond = {"c_concat" if self.model.conditioning_key == "concat" else "c_crossattn": cond}
        return self.model(x_noisy, t, **cond)

    def predict_noise(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The predicted noise, whatever the network predicts; what samplers ask for. t [b] may be fractional."""
        predicted = self.apply_model(x_noisy, t, cond)
        return self.prediction.to_epsilon(predicted, x_noisy, *self.level(t, x_noisy))

    def loss_of(
        self, predicted: Tensor, x_start: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and its parts for logging, from what the UNet predicted; only where the mask [b, 1, h, w] is 1."""
        target = self.prediction.target(x_start, noise, *self.level(t, x_start))
        return diffusion_loss(
            simple_loss(predicted.float(), target.float(), self.loss_type, mask, self.mask_as_published),
            t,
            self.logvar,
            self.lvlb_weights,
            self.simple_weight(t),
            self.original_elbo_weight,
            self.learn_logvar,
        )

    def simple_weight(self, t: Tensor) -> float | Tensor:
        """What the errors at steps t [b] weigh in the loss: `l_simple_weight`, times Min-SNR's weights if asked for."""
        if self.min_snr_gamma is None:
            return self.l_simple_weight
        alphas_cumprod = self.alphas_cumprod.to(t.device)[t]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        return self.l_simple_weight * self.prediction.min_snr_weight(snr, self.min_snr_gamma)

    def p_losses(
        self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at steps t [b] for clean x_0 under a condition (arXiv 2112.10752, eqs. 2 and 3), and its parts."""
        noise = torch.randn_like(x_start) if noise is None else noise
        predicted = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        loss, parts = self.loss_of(predicted, x_start, noise, t)
        return loss, self._prefixed(parts)

    def _prefixed(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{'train' if self.training else 'val'}/{name}": value for name, value in parts.items()}

    def forward(self, x: Tensor, cond: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss for clean x_0 [b, c, h, w] at steps drawn at random."""
        t = torch.randint(0, self.num_timesteps, (len(x),), device=x.device)
        return self.p_losses(x, cond, t)

    # --- training

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """An entry [b, h, w, c] or [b, h, w] of a batch as [b, c, h, w]."""
        x = batch[k]
        return rearrange(x if x.dim() == 4 else x[..., None], "b h w c -> b c h w").contiguous().float()

    def clean(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """x_0 [b, c, h, w] of a batch and its condition."""
        return self.get_input(batch, self.first_stage_key), None

    def draw(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any, Tensor, Tensor]:
        """x_0, condition, steps t [b] and noise for one batch, drawn in the order of the published code."""
        x_start, cond = self.clean(batch)
        t = self.draws.steps(self.num_timesteps, len(x_start), x_start.device)
        return x_start, cond, t, self.draws.normal_like(x_start)

    @contextmanager
    def drawing(self, draws: Draws) -> Iterator[None]:
        """Within this context random numbers come from `draws`."""
        usual, self.draws = self.draws, draws
        try:
            yield
        finally:
            self.draws = usual

    def sharing(self, trainer: pl.Trainer | None, batch_idx: int, shared: SharedDraws) -> AbstractContextManager:
        """`drawing` the rows of a training batch, where several of them make a step."""
        processes, batches = (trainer.world_size, trainer.accumulate_grad_batches) if trainer else (1, 1)
        if processes * batches == 1:
            return nullcontext()
        place = batch_idx % batches
        shared.begin(rows_of_step(trainer.global_rank, processes, place, batches), is_first=place == 0)
        return self.drawing(shared)

    def losses(self, batches: Sequence[Mapping[str, Any]]) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The loss of each batch, from one call of the UNet for all of them."""
        stream = self.streams[0].drawing_from(self.device) if self.streams and self.training else nullcontext()
        with stream:
            drawn = [self.draw(batch) for batch in batches]
        return self.losses_of(
            drawn, [mask_of(batch, x.shape[2:]) for batch, (x, *_) in zip(batches, drawn, strict=True)]
        )

    def losses_of(
        self, drawn: Sequence[tuple[Tensor, Any, Tensor, Tensor]], masks: Sequence[Tensor | None] | None = None
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The losses for what `draw` gave, from one call of the UNet."""
        if len({x_start.shape[1:] for x_start, *_ in drawn}) > 1:
            raise InputError(
                "pictures of the subject and of its class must have one size; set data.params.*.params.size"
            )
        x_start, cond, t, noise = (_join(*column) for column in zip(*drawn, strict=True))
        predicted = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        sizes = [len(x) for x, *_ in drawn]
        columns = [column.split(sizes) for column in (predicted, x_start, noise, t)]
        return [self.loss_of(*parts) for parts in zip(*columns, masks or [None] * len(drawn), strict=True)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch, or of DreamBooth's pair [subject, class] (arXiv 2208.12242, eq. 2)."""
        batches = batch if isinstance(batch, (list, tuple)) else [batch]
        with self.sharing(self._trainer, batch_idx, self._shared):
            (loss, parts), *prior = self.losses(batches)
        told = self._prefixed(parts)
        for prior_loss, _ in prior:
            told["train/loss_prior"] = prior_loss
            loss = dreambooth_loss(loss, prior_loss, self.reg_weight)
        *named, total = self._means_of_step({**told, "loss": loss}, batch_idx).items()
        size, several = len(batches[0][self.first_stage_key]), bool(self.streams)
        self.log_dict(dict(named), batch_size=size, sync_dist=several)
        self.log(*total, prog_bar=True, logger=False, batch_size=1, sync_dist=several)
        return loss

    def _means_of_step(self, told: Mapping[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """What to log, as means over the batches that were accumulated for this step so far."""
        told = {name: value.detach() for name, value in told.items()}
        batches = self._trainer.accumulate_grad_batches if self._trainer else 1
        if batches == 1:
            return told
        place = batch_idx % batches
        self._sums = {name: value + (self._sums[name] if place else 0) for name, value in told.items()}
        return {name: value / (place + 1) for name, value in self._sums.items()}

    @torch.no_grad()
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs val/loss, and val/loss_ema with the averaged weights where they are kept; on the same draws always."""
        batch = batch[0] if isinstance(batch, (list, tuple)) else batch
        scopes = {"": nullcontext, "_ema": self.ema_scope} if self.use_ema else {"": nullcontext}
        for suffix, scope in scopes.items():
            with scope(), fixed_draws(batch_idx, self.device), self._validating(batch_idx):
                [(_, parts)] = self.losses([batch])
            parts = {name + suffix: value for name, value in self._prefixed(parts).items()}
            size = len(batch[self.first_stage_key])
            self.log_dict(parts, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)

    def _validating(self, batch_idx: int) -> AbstractContextManager:
        """`drawing` the rows of a validation batch, where several processes share it."""
        loader = self._trainer.val_dataloaders if self.streams else None
        share = getattr(getattr(loader, "batch_sampler", None), "rows", None)
        if share is None:
            return nullcontext()
        shared = SharedDraws()
        shared.begin(lambda _: share(batch_idx))
        return self.drawing(shared)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """A step of the optimizer, which the averages follow before any callback saves them."""
        step = self.global_step
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.after_step(step, optimizer)
        if self.use_ema:
            self.model_ema(self.model)

    def after_step(self, step: int, optimizer: Any) -> None:
        """What follows on the optimizer's step number `step`."""

    def learning(self) -> dict[str, nn.Parameter]:
        """What learns, by state-dict name."""
        return dict(self.named_parameters())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What learns, as the groups of an optimizer; none where nothing does."""
        return [{"params": learning}] if (learning := list(self.learning().values())) else []

    def configure_optimizers(self) -> Any:
        """AdamW, or what `optimizer_config` names, over what learns; each parameter once."""
        groups = self.parameter_groups()
        if not groups:
            raise InputError("nothing learns in this config: set model.params.train_level or model.params.tuning")
        return self.optimizers_of(groups, self.learning_rate)

    def optimizers_of(self, groups: Sequence[Mapping[str, Any]], rate: float) -> Any:
        """The config's optimizer over groups of parameters, and its schedule if it has one, as Lightning takes them."""
        if "lr" in (self.optimizer_config.get("params") or {}):
            raise InputError("optimizer_config.params.lr: the learning rate is model.base_learning_rate; set it there")
        optimizer = instantiate_from_config(self.optimizer_config, params=groups, lr=rate)
        if self.scheduler_config is None:
            return optimizer
        schedule = instantiate_from_config(self.scheduler_config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=schedule.schedule)
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]

    # --- checkpoints hold what learns; the rest is the base model, which stays in its own file

    strict_loading = False

    def _is_saved(self, name: str, learning: Mapping[str, Any]) -> bool:
        return name in learning or name.startswith("model_ema.") or name == "scale_factor"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        learning = self.learning()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if self._is_saved(name, learning)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        learning = self.learning()
        expected = {name: value for name, value in self.state_dict().items() if self._is_saved(name, learning)}
        found = checkpoint["state_dict"]
        differing = sorted(expected.keys() ^ found.keys())
        differing += [name for name in expected.keys() & found.keys() if expected[name].shape != found[name].shape]
        if differing:
            raise InputError(
                f"the checkpoint is of another run: it differs in {len(differing)} tensors, e.g. {differing[0]}"
            )


def mask_of(batch: Mapping[str, Any], size: torch.Size) -> Tensor | None:
    """A batch's mask of pixels [b, H, W] as a mask of latents [b, 1, h, w]: those whose pixels are all in it."""
    if "mask" not in batch:
        return None
    mask = batch["mask"].float()
    return -nn.functional.adaptive_max_pool2d(-(mask if mask.dim() == 4 else mask[:, None]), tuple(size))


@contextmanager
def fixed_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Within this context random numbers begin at `seed`; afterwards they go on as if it had not been."""
    with forked_rng(device):
        torch.manual_seed(seed)
        yield


def _join(*parts: Any) -> Any:
    return None if parts[0] is None else batched(*parts)
