"""SDXL under sgm's name: latent diffusion with a text context and a vector as condition (arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import get_obj_from_str, instantiate_from_config
from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.discretizer import LegacyDDPMDiscretization
from ldm.models.diffusion.sigma_loss import DiscreteSampling, StandardDiffusionLoss
from ldm.models.diffusion.wrapper import OpenAIWrapper
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

TEXT_KEY = "txt"
SIZES = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")


class DiffusionEngine(LatentDiffusion):
    """`LatentDiffusion` with sgm's parameters and state-dict names: `conditioner`, `denoiser`, `first_stage_model`.

    The denoiser's scaling defines what the network predicts; `loss_fn_config` defines the weights of errors in training
    (by default all equal). A batch has `input_key`, pictures [b, 3, H, W] or [b, H, W, 3], `txt` (or `caption`), and
    (height, width) or (top, left) as `original_size_as_tuple`, `crop_coords_top_left` and `target_size_as_tuple`.
    Without these, pictures count as uncropped and unscaled. Raises `InputError` for parts that do not fit together.
    """

    GIVEN = (
        "unet_config", "cond_stage_config", "parameterization", "given_betas", "conditioning_key", "first_stage_key",
        "channels", "timesteps", "beta_schedule", "linear_start", "linear_end", "cosine_s", "loss_type", "concat_mode",
        "num_timesteps_cond", "cond_stage_key", "cond_stage_forward", "zero_terminal_snr",
    )  # fmt: skip
    condition_name = "conditioner"
    saves_schedule = False

    def __init__(
        self,
        network_config: Mapping,
        denoiser_config: Mapping,
        first_stage_config: Mapping,
        conditioner_config: Mapping | None = None,
        sampler_config: Mapping | None = None,
        optimizer_config: Mapping | None = None,
        scheduler_config: Mapping | None = None,
        loss_fn_config: Mapping | None = None,
        network_wrapper: str | None = None,
        ckpt_path: str | None = None,
        use_ema: bool = False,
        ema_decay_rate: float = 0.9999,
        scale_factor: float = 1.0,
        disable_first_stage_autocast: bool = False,
        input_key: str = "jpg",
        log_keys: Sequence[str]
        | None = None,  # unused, as `no_cond_log`: the callbacks decide what to log
        no_cond_log: bool = False,
        compile_model: bool = False,
        en_and_decode_n_samples_a_time: int | None = None,
        image_size: int = 128,
        **latent: Any,
    ) -> None:
        denoiser = instantiate_from_config(denoiser_config)
        self.wrapper = (get_obj_from_str(network_wrapper) if network_wrapper else OpenAIWrapper, compile_model)
        self.ema_decay, self.samples_at_once = ema_decay_rate, en_and_decode_n_samples_a_time
        self.disable_first_stage_autocast = disable_first_stage_autocast
        super().__init__(
            unet_config=network_config,
            first_stage_config=first_stage_config,
            cond_stage_config=conditioner_config or UNCONDITIONAL,
            parameterization=_prediction(denoiser),
            given_betas=_betas(denoiser),
            conditioning_key="crossattn",
            scale_factor=scale_factor,
            optimizer_config=optimizer_config,
            scheduler_config=scheduler_config,
            first_stage_key=input_key,
            image_size=image_size,
            channels=_params(network_config).get("in_channels", 4),
            ckpt_path=ckpt_path,
            use_ema=use_ema,
            **latent,
        )
        self.denoiser, self.input_key = denoiser, input_key
        self.loss_fn = None if loss_fn_config is None else _loss(loss_fn_config)
        if self.loss_fn is not None:
            self.loss_type = self.loss_fn.loss_type
        self.sampler = None if sampler_config is None else instantiate_from_config(sampler_config)

    def _network(self, unet_config: Mapping, conditioning_key: str | None) -> nn.Module:
        wrapper, compile_model = self.wrapper
        return wrapper(instantiate_from_config(unet_config), compile_model)

    @property
    def cond_stage_model(self) -> nn.Module:
        """LDM's name for the conditioner."""
        return self.conditioner

    # --- the model and its loss

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        """The UNet's prediction for x_t with a condition, a dict with `crossattn` and `vector`."""
        return self.model(x_noisy, t, cond)

    def simple_weight(self, t: Tensor) -> float | Tensor:
        """The weight of the prediction's error: the weight of x_0's error in `loss_fn_config`, converted."""
        weight = super().simple_weight(t)
        if self.loss_fn is None:
            return weight
        sigma = self.denoiser.sigmas.to(t.device)[t]
        change = self.denoiser.scaling(sigma)[1].abs()
        return weight * self.loss_fn.loss_weighting(sigma) * (change**2 if self.loss_type == "l2" else change)

    def forward(self, x: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss for latents x [b, c, h, w] and the condition in their batch, and `{"loss": loss}`."""
        if self.loss_fn is None:
            loss, _ = self.p_losses(x, self._condition(batch, x), self._steps_for(x))
        else:
            loss = self.loss_fn(self.model, self.denoiser, self.conditioner, x, self.full_batch(batch, x)).mean()
        return loss, {"loss": loss}

    def shared_step(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch of pictures."""
        return self(self.encode_first_stage(self.get_input(batch)), batch)

    def _steps_for(self, x: Tensor) -> Tensor:
        return torch.randint(0, self.num_timesteps, (len(x),), device=x.device)

    # --- pictures

    def get_input(self, batch: Mapping[str, Any], k: str | None = None) -> Tensor:
        """Pictures [b, c, H, W] of a batch, whose channels are the second or the last dimension."""
        value = batch[k or self.input_key]
        if value.dim() == 4 and value.shape[1] == 3 and value.shape[-1] != 3:
            return value.float()
        return super().get_input(batch, k or self.input_key)

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Tensor:
        """Latents, sampled from the autoencoder's posterior, at the scale of the diffusion."""
        parts = x.split(self.samples_at_once or len(x))
        return torch.cat([self._latents(self.first_stage_model.encode(part)) for part in parts])

    def _latents(self, posterior: Any) -> Tensor:
        return LatentDiffusion.get_first_stage_encoding(self, posterior)

    def get_first_stage_encoding(self, encoder_posterior: Any) -> Tensor:
        """The latents of a posterior; results of `encode_first_stage` are latents already."""
        is_posterior = isinstance(encoder_posterior, DiagonalGaussianDistribution)
        return self._latents(encoder_posterior) if is_posterior else encoder_posterior

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Pictures from latents, never in float16, because SDXL's autoencoder would overflow."""
        stage = getattr(self.first_stage_model, "first_stage", self.first_stage_model)  # itself, of a cache
        if next(stage.parameters()).dtype == torch.float16:
            stage.float()
        dtype = next(stage.parameters()).dtype
        with torch.autocast(z.device.type, enabled=False):
            parts = (z / self.scale_factor).to(dtype).split(self.samples_at_once or len(z))
            return torch.cat([self.first_stage_model.decode(part) for part in parts])

    # --- the condition

    def text_encoders(self) -> dict[str, nn.Module]:
        found = {number: one for number, one in enumerate(self.conditioner.embedders) if one.input_keys == [TEXT_KEY]}
        return {f"{self.condition_name}.embedders.{number}": one for number, one in found.items()}

    def replace_text_encoder(self, name: str, encoder: nn.Module) -> None:
        self.conditioner.replace(int(name.rpartition(".")[2]), encoder)

    def get_learned_conditioning(self, c: Any) -> dict[str, Tensor]:
        """The condition of a batch, or of prompts for pictures of the model's native size."""
        if not isinstance(c, Mapping):
            side = self.image_size * self.first_stage_model.downsampling_factor
            c = self.batch_of([c] if isinstance(c, str) else c, (side, side))
        return self.conditioner(c)

    def batch_of(self, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        """The conditioner's input for prompts and uncropped pictures of `size` (height, width)."""

        def rows(pair: tuple[int, int]) -> Tensor:
            return torch.tensor([pair] * len(prompts), dtype=torch.float32, device=self.betas.device)

        return {TEXT_KEY: list(prompts), **dict(zip(SIZES, (rows(size), rows((0, 0)), rows(size)), strict=True))}

    def conditions(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        guided: bool = True,
        negative: Sequence[str] | None = None,
        weighted: bool = False,
        zeroed: Iterable[str] = (TEXT_KEY,),
    ) -> tuple[Any, Any]:
        """The conditions of prompts for pictures of `size`, and the unconditional side of guidance.

        The latter comes from the `negative` prompts if one of them is not empty, else it has zeros instead of the text.
        Raises `InputError` for weighted prompts, which this conditioner does not support.
        """
        if weighted:
            raise InputError("prompt weights are for models with one text encoder; this one has two: leave them out")
        batch, against = self.batch_of(prompts, size), None
        if any(negative or []):
            against, zeroed = self.batch_of(negative, size), ()
        cond, uncond = self.conditioner.get_unconditional_conditioning(
            batch, against, force_uc_zero_embeddings=list(zeroed)
        )
        return cond, uncond if guided else None

    def full_batch(self, batch: Mapping[str, Any], latents: Tensor) -> dict[str, Any]:
        """A batch with the text under `txt` and with sizes; without sizes, the picture counts as uncropped."""
        prompts = batch[TEXT_KEY] if TEXT_KEY in batch else batch["caption"]
        size = tuple(side * self.first_stage_model.downsampling_factor for side in latents.shape[-2:])
        return self.batch_of(prompts, size) | dict(batch)

    def _condition(self, batch: Mapping[str, Any], latents: Tensor) -> Any:
        return self.conditioner(self.full_batch(batch, latents))

    # --- sampling

    @torch.no_grad()
    def sample(
        self, cond: Mapping, uc: Mapping | None = None, batch_size: int = 16, shape: Sequence[int] | None = None,
        **more: Any,
    ) -> Tensor:  # fmt: skip
        """Latents [batch_size, *shape] by the sampler of the config. `more` goes to the network."""
        if self.sampler is None:
            raise InputError("DiffusionEngine: the config has no sampler_config")
        shape = shape or (self.channels, self.image_size, self.image_size)

        def denoiser(x: Tensor, sigma: Tensor, c: Mapping) -> Tensor:
            return self.denoiser(self.model, x, sigma, c, **more)

        noise = torch.randn(batch_size, *shape).to(self.betas.device)
        return self.sampler(denoiser, noise, cond, uc=uc)


UNCONDITIONAL = {"target": "ldm.modules.encoders.conditioner.GeneralConditioner", "params": {"emb_models": []}}


def _params(config: Mapping) -> Mapping:
    return config.get("params") or {}


def _prediction(denoiser: Denoiser) -> str:
    name = getattr(getattr(denoiser, "scaling", None), "prediction", None)
    if name is None or not hasattr(denoiser, "sigma_to_idx"):
        raise InputError(
            "DiffusionEngine: denoiser_config must be a DiscreteDenoiser with EpsScaling or VScaling, got "
            f"{type(denoiser).__name__} with {type(getattr(denoiser, 'scaling', None)).__name__}"
        )
    return name


def _betas(denoiser: Denoiser) -> Any:
    discretization = denoiser.discretization
    if not isinstance(discretization, LegacyDDPMDiscretization):
        raise InputError(
            "DiffusionEngine: discretization_config must be LegacyDDPMDiscretization, got "
            f"{type(discretization).__name__}"
        )
    if denoiser.num_idx != discretization.num_timesteps:
        raise InputError(
            f"DiffusionEngine: num_idx of the denoiser is {denoiser.num_idx}, its discretization has "
            f"{discretization.num_timesteps} time steps: they must agree"
        )
    return discretization.betas


def _loss(config: Mapping) -> StandardDiffusionLoss:
    loss: Callable = instantiate_from_config(config)
    if not isinstance(loss, StandardDiffusionLoss) or not isinstance(loss.sigma_sampler, DiscreteSampling):
        raise InputError("DiffusionEngine: loss_fn_config must be a StandardDiffusionLoss with DiscreteSampling")
    return loss
