"""Denoising diffusion, in the space of the batch itself (arXiv 2006.11239) and in latents (arXiv 2112.10752).

The models have LDM's names. Their common training is in `training.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm.checkpoints import read_weights
from ldm.config import ALIASES, get_obj_from_str, instantiate_from_config, plain
from ldm.errors import InputError
from ldm.models.building import fill_added, load_base
from ldm.models.diffusion.ancestral import AncestralSampling
from ldm.models.diffusion.condition import Condition
from ldm.models.diffusion.guidance import batched
from ldm.models.diffusion.losses import diffusion_loss, simple_loss
from ldm.models.diffusion.objective import Objective
from ldm.models.diffusion.parameter_rates import check_rates, grouped
from ldm.models.diffusion.prediction import prediction
from ldm.models.diffusion.process import DiffusionProcess
from ldm.models.diffusion.training import DiffusionTraining, Drawn
from ldm.models.diffusion.wrapper import DiffusionWrapper
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.modules.parts import refuse_sizes
from ldm.tuning import Tuning, families, freeze_rest

DDPM_OBJECTIVE = Objective()  # equal weights of all time steps, plain noise


class DDPM(DiffusionProcess, AncestralSampling, DiffusionTraining):
    """Denoising diffusion in the space of the batch itself, with LDM's constructor arguments and buffer names.

    The training run sets the attribute `learning_rate`. `loss` says what steps draw and how errors are weighted
    (`ldm.schema.Loss`); `min_snr_gamma: 5` is short for `loss: {weighting: min_snr, gamma: 5}`. `zero_terminal_snr`
    changes the schedule so that its last step is pure noise (see `zero_terminal`); then the prediction must be v or x0.
    Raises `InputError` for invalid values.
    """

    ema_decay = 0.9999

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
        loss: Mapping | None = None,
        learning_rates: Mapping[str, float | str] | None = None,
        mask_as_published: bool = False,  # see `ldm.models.diffusion.losses.simple_loss`
        zero_terminal_snr: bool = False,
    ) -> None:
        super().__init__()
        self.prediction = prediction(parameterization)
        if loss_type not in ("l1", "l2"):
            raise InputError(f"loss_type must be l1 or l2, got {loss_type!r}")
        self.parameterization, self.loss_type, self.v_posterior = parameterization, loss_type, v_posterior
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise InputError(f"min_snr_gamma must be positive, got {min_snr_gamma}")
        self.original_elbo_weight, self.l_simple_weight = original_elbo_weight, l_simple_weight
        if min_snr_gamma is not None:
            if "weighting" in (loss or {}):
                raise InputError("min_snr_gamma and loss.weighting say the same thing twice: leave min_snr_gamma out")
            loss = {**(loss or {}), "weighting": "min_snr", "gamma": float(min_snr_gamma)}
        refuse_sizes("the diffusion model", image_size=image_size, channels=channels)
        self.objective = Objective(loss, self.prediction)
        self.learning_rates = check_rates(learning_rates)
        self.first_stage_key, self.image_size, self.channels = first_stage_key, image_size, channels
        self.log_every_t, self.learn_logvar, self.mask_as_published = log_every_t, learn_logvar, mask_as_published
        self.scheduler_config = scheduler_config
        self.optimizer_config = optimizer_config or {"target": "torch.optim.AdamW"}
        if monitor is not None:
            self.monitor = monitor
        self.model = self._network(unet_config, conditioning_key)
        if zero_terminal_snr and parameterization == "eps":
            raise InputError("zero_terminal_snr needs parameterization v or x0: of noise alone, noise tells nothing")
        self.zero_terminal_snr = zero_terminal_snr
        self.register_schedule(given_betas, beta_schedule, timesteps, linear_start, linear_end, cosine_s)
        self.objective.range_of(self.num_timesteps)
        logvar = torch.full((self.num_timesteps,), float(logvar_init))
        if learn_logvar:
            self.logvar = nn.Parameter(logvar)
        else:
            self.register_buffer("logvar", logvar, persistent=False)
        self.use_ema = use_ema
        self._install(use_ema, ckpt_path)

    def _network(self, unet_config: Mapping, conditioning_key: str | None) -> nn.Module:
        """The UNet in the wrapper that passes it the condition."""
        return DiffusionWrapper(unet_config, conditioning_key)

    def _install(self, use_ema: bool, ckpt_path: str | None) -> dict[str, Tensor]:
        """The last steps of construction. Returns the tensors of the checkpoint that belong to tuning."""
        if use_ema:
            self.model_ema = LitEma(self.model, self.ema_decay)
        return {} if ckpt_path is None else self._load_base(ckpt_path)

    def _load_base(self, path: str) -> dict[str, Tensor]:
        return load_base(self, read_weights(path), source=str(path))

    def init_from_ckpt(self, path: str) -> None:
        """Load the weights of a checkpoint. Tuned parameters that the checkpoint lacks stay as they are."""
        fill_added(self, self._load_base(path), path)

    def weights_loaded(self, lacking: Set[str]) -> None:
        """Start averages that a checkpoint lacks at its weights; `load_weights` calls this."""
        if self.use_ema:
            self.model_ema.begin(self.model, {name.removeprefix("model_ema.") for name in lacking})

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within this context, the UNet has its averaged weights if there are any."""
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
        """The UNet's prediction for x_t: the noise, x_0 or the velocity, according to `parameterization`.

        `cond`: a tensor, a list of tensors, or LDM's `{"c_concat": [...], "c_crossattn": [...]}`.
        """
        if not isinstance(cond, Mapping):
            cond = cond if isinstance(cond, Sequence) or cond is None else [cond]
            cond = {"c_concat" if self.model.conditioning_key == "concat" else "c_crossattn": cond}
        return self.model(x_noisy, t, **cond)

    def predict_noise(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The predicted noise, which samplers need, for any `parameterization`. t [b] may be fractional."""
        predicted = self.apply_model(x_noisy, t, cond)
        return self.prediction.to_epsilon(predicted, x_noisy, *self.level(t, x_noisy))

    def loss_of(
        self, predicted: Tensor, x_start: Tensor, noise: Tensor, t: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a prediction and its parts for logging, only where the mask [b, 1, h, w] is 1."""
        target = self.prediction.target(x_start, noise, *self.level(t, x_start))
        snr = self.signal_to_noise(t)

        def errors(predicted: Tensor, target: Tensor) -> Tensor:
            return self.objective.errors(predicted, target, t, snr, self.num_timesteps, self.loss_type)

        return diffusion_loss(
            simple_loss(predicted.float(), target.float(), errors, mask, self.mask_as_published),
            t,
            self.logvar,
            self.lvlb_weights,
            self.simple_weight(t),
            self.original_elbo_weight,
            self.learn_logvar,
        )

    def simple_weight(self, t: Tensor) -> float | Tensor:
        """The weight of errors at time steps t [b] in the loss: one number for all, or [b]."""
        return self.l_simple_weight * self.objective.weight(self.signal_to_noise(t))

    def signal_to_noise(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratios [b] at time steps t [b]: alpha_bar / (1 - alpha_bar)."""
        alphas_cumprod = self.alphas_cumprod.to(t.device)[t]
        return alphas_cumprod / (1 - alphas_cumprod)

    def p_losses(
        self, x_start: Tensor, cond: Any, t: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss at steps t [b] for clean x_0 with a condition (arXiv 2112.10752, eqs. 2 and 3), and its parts."""
        noise = torch.randn_like(x_start) if noise is None else noise
        predicted = self.apply_model(self.q_sample(x_start, t, noise), t, cond)
        loss, parts = self.loss_of(predicted, x_start, noise, t)
        return loss, self._prefixed(parts)

    def _prefixed(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"{'train' if self.training else 'val'}/{name}": value for name, value in parts.items()}

    def forward(self, x: Tensor, cond: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss for clean x_0 [b, c, h, w] at random steps."""
        t = torch.randint(0, self.num_timesteps, (len(x),), device=x.device)
        return self.p_losses(x, cond, t)

    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """An entry [b, h, w, c] or [b, h, w] of a batch as [b, c, h, w]."""
        x = batch[k]
        return rearrange(x if x.dim() == 4 else x[..., None], "b h w c -> b c h w").contiguous().float()

    def clean(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """x_0 [b, c, h, w] of a batch and its condition."""
        return self.get_input(batch, self.first_stage_key), None

    def draw(self, batch: Mapping[str, Any]) -> Drawn:
        """x_0, condition, steps t [b], noise and x_t for one batch, sampled in the order of the published code.

        Validation samples as DDPM does, so that its losses are comparable between objectives.
        """
        objective = self.objective if self.training else DDPM_OBJECTIVE
        x_start, cond = self.clean(batch)
        t = objective.steps(self.draws, self.num_timesteps, len(x_start), x_start.device)
        noise = objective.noise(self.draws, x_start)
        return x_start, cond, t, noise, self.q_sample(x_start, t, objective.added(self.draws, noise))

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """LDM's name for the loss of a batch and its parts, at random steps."""
        return self(*self.clean(batch))

    def losses_of(
        self, drawn: Sequence[Drawn], masks: Sequence[Tensor | None] | None = None
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The losses for several results of `draw`, from one call of the UNet for each shape that they have."""
        masks = masks or [None] * len(drawn)
        if len({x_start.shape[1:] for x_start, *_ in drawn}) > 1:  # buckets: the class pictures have their own
            return [loss for one, mask in zip(drawn, masks, strict=True) for loss in self.losses_of([one], [mask])]
        x_start, cond, t, noise, x_noisy = (_join(*column) for column in zip(*drawn, strict=True))
        predicted = self.apply_model(x_noisy, t, cond)
        sizes = [len(x) for x, *_ in drawn]
        columns = [column.split(sizes) for column in (predicted, x_start, noise, t)]
        return [self.loss_of(*parts) for parts in zip(*columns, masks, strict=True)]

    def rest(self, step: int) -> None:
        """Remove the gradients of parameters that are not trained in this step."""

    def after_step(self, step: int, optimizer: Any) -> None:
        """A hook after the optimizer's step number `step`."""

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by state-dict name."""
        return dict(self.named_parameters())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trainable parameters as groups of an optimizer; empty if there are none."""
        learning = self.trainable_parameters()
        usual = getattr(self, "learning_rate", None)
        return grouped([(None, learning, {})], self.learning_rates, usual) if learning else []


def with_words(tuning: Mapping | Sequence[Mapping] | None, personalization_config: Mapping | None) -> Any:
    """The entries of `tuning`, and those that a published `personalization_config` asks for."""
    if personalization_config is None:
        return tuning
    given = plain(tuning) or []
    return [*([given] if isinstance(given, Mapping) else given), *instantiate_from_config(personalization_config)]


class LatentDiffusion(Condition, DDPM):
    """Diffusion in the latents of a frozen autoencoder, conditioned on text, class labels, pictures or nothing.

    Trainable are the families of `tuning` and `train_level` (see `ldm.tuning`); without either, the UNet and, if
    `cond_stage_trainable`, the encoder of the condition. `personalization_config` is the published name for words that
    learn, see `ldm.tuning.embedding_manager`. `reg_weight` is the weight of DreamBooth's class pictures.
    """

    clips_x0 = False

    def __init__(
        self,
        unet_config: Mapping,
        first_stage_config: Mapping,
        cond_stage_config: Mapping | str,
        num_timesteps_cond: int | None = None,
        cond_stage_key: str = "image",
        cond_stage_trainable: bool = False,
        concat_mode: bool = True,
        cond_stage_forward: str | None = None,
        conditioning_key: str | None = None,
        scale_factor: float = 1.0,
        scale_by_std: bool = False,
        reg_weight: float = 1.0,
        embedding_reg_weight: float = 0.0,  # unused; accepted because older YAML files have it
        train_level: str | Sequence[str] | None = None,
        tuning: Mapping | Sequence[Mapping] | None = None,
        personalization_config: Mapping | None = None,
        use_ema: bool = True,
        ckpt_path: str | None = None,
        install_tuning: bool = True,
        **ddpm: Any,
    ) -> None:
        if (num_timesteps_cond or 1) != 1:
            raise InputError(
                f"num_timesteps_cond must be 1, got {num_timesteps_cond}: shortened schedules are not supported"
            )
        if conditioning_key is None:
            conditioning_key = "concat" if concat_mode else "crossattn"
        if cond_stage_config == "__is_unconditional__":
            conditioning_key = None
        unet_config, adapter_config = without_adapters(unet_config)
        super().__init__(unet_config, conditioning_key=conditioning_key, use_ema=False, ckpt_path=None, **ddpm)
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        self.cond_stage_forward, self.reg_weight = cond_stage_forward, reg_weight
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = float(scale_factor)
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        is_first_stage = cond_stage_config == "__is_first_stage__"
        encoder = self.first_stage_model if is_first_stage else instantiate_from_config(cond_stage_config)
        setattr(self, self.condition_name, encoder)
        tuning = with_words(tuning, personalization_config)
        self.is_tuned = bool(train_level or tuning)  # else the whole model is trained, not a change of a base
        whole = ["unet", "embeder"] if cond_stage_trainable else ["unet"]
        levels = train_level if self.is_tuned else whole
        self.tuning = Tuning(self, families(levels, tuning, adapter_config))
        self.use_ema = use_ema
        freeze_rest(self, self.trainable_parameters())
        self.for_tuning = self._install(use_ema, ckpt_path), str(ckpt_path)
        if install_tuning:
            self.tune()

    def tune(self) -> None:
        """Install the families on the base weights, and freeze all parameters that they do not train."""
        self.tuning.install()
        freeze_rest(self, self.trainable_parameters())
        if self.use_ema and not self.model_ema.tracks(self.model):
            self.model_ema = LitEma(self.model, self.ema_decay, known=self.model_ema)
        fill_added(self, *self.for_tuning)
        self.for_tuning = {}, ""

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters of the families by state-dict name."""
        return self.tuning.parameters() | self._own()

    def _own(self) -> dict[str, nn.Parameter]:
        return {"logvar": self.logvar} if self.learn_logvar else {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A group for each learning rate of the families; families without their own rate share the first group."""
        families = [(one.learning_rate, own, one.group) for one, own in self.tuning.by_family()]
        usual = getattr(self, "learning_rate", None)
        return grouped([(None, self._own(), {}), *families], self.learning_rates, usual)

    # --- stages: outside its steps a family's parameters have no gradient, so no optimizer changes them.
    # The trained families depend only on the step, so a run can be resumed within any stage.

    def rest(self, step: int) -> None:
        if all(one.learns_at(step) for one in self.tuning.families):
            return
        active = self.tuning.parameters(of=lambda one: one.learns_at(step))
        for name, parameter in self.tuning.parameters(of=lambda one: not one.learns_at(step)).items():
            if name not in active:
                parameter.grad = None

    def after_step(self, step: int, optimizer: Any) -> None:
        for chosen in self.tuning.families:
            if not (chosen.learns_at(step) and hasattr(chosen.family, "after_step")):
                continue
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            learning = chosen.family.trainable(self).values()
            chosen.family.after_step(self, max((rates[id(p)] for p in learning), default=0.0))

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Training mode for trainable parts; frozen stages stay in evaluation mode."""
        super().train(mode)
        for stage in (self.first_stage_model, self.cond_stage_model):
            if stage is not None:
                stage.train(mode and any(p.requires_grad for p in stage.parameters()))
        return self

    # --- the first stage: pictures [b, 3, H, W] in [-1, 1] to latents [b, c, h, w] and back

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Any:
        """The autoencoder's posterior over latents, or its latents if it has none."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(self, encoder_posterior: Any) -> Tensor:
        """Latents, sampled from a posterior, at the scale of the diffusion."""
        latents = encoder_posterior
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            latents = encoder_posterior.sample(noise=self.draws.normal(encoder_posterior.mean.shape))
        return self.scale_factor * latents

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Pictures from latents."""
        return self.first_stage_model.decode(z / self.scale_factor)

    def clean(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        pictures = self.get_input(batch, self.first_stage_key)
        latents = self.get_first_stage_encoding(self.encode_first_stage(pictures)).detach()
        return latents, self._condition(batch, latents)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """With `scale_by_std`, set the factor that gives the latents of the first batch unit variance."""
        if self.scale_by_std and self.global_step == 0 and batch_idx == 0:
            latents, _ = self.clean(batch[0] if isinstance(batch, (list, tuple)) else batch)
            self.scale_factor.fill_(self.scale_factor / latents.std())


def without_adapters(unet_config: Mapping) -> tuple[Any, Any]:
    """The config of a UNet without its `adapter_config`, and the `adapter_config`, which is a family of tuning."""
    config = plain(unet_config)
    if not isinstance(config, Mapping) or not isinstance(config.get("params"), Mapping):
        return unet_config, None
    params = dict(config["params"])
    adapter_config = params.pop("adapter_config", None)
    return {**config, "params": params}, adapter_config


def __getattr__(name: str) -> Any:
    """Classes that LDM has in this module but that are in other modules here (PEP 562)."""
    published = f"{__name__}.{name}"
    if published not in ALIASES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return get_obj_from_str(published)


def _join(*parts: Any) -> Any:
    return None if parts[0] is None else batched(*parts)
