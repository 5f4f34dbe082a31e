"""Diffusion in the latents of a frozen autoencoder (arXiv 2112.10752), under LDM's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import instantiate_from_config
from ldm.errors import InputError
from ldm.models.building import BASE_IS_COMING
from ldm.models.diffusion.pixels import DDPM, DiffusionWrapper, mask_of  # noqa: F401 (LDM has them here)
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.ema import LitEma
from ldm.tuning import Chosen, families, freeze_rest, shares, trainable


class LatentDiffusion(DDPM):
    """Diffusion in the latents of a frozen autoencoder, conditioned on text, class labels, pictures or nothing.

    What learns: the families of `tuning` and `train_level` (see `ldm.tuning`); without either, the UNet and, if
    `cond_stage_trainable`, the encoder of the condition. `reg_weight` weighs the class pictures of DreamBooth.
    """

    def __init__(
        self,
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
        embedding_reg_weight: float = 0.0,  # weighed the embedding manager's loss, which position tuning has not
        train_level: str | Sequence[str] | None = None,
        tuning: Mapping | Sequence[Mapping] | None = None,
        use_ema: bool = True,
        ckpt_path: str | None = None,
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
        super().__init__(conditioning_key=conditioning_key, use_ema=False, ckpt_path=None, **ddpm)
        self.cond_stage_key, self.cond_stage_trainable = cond_stage_key, cond_stage_trainable
        self.cond_stage_forward, self.reg_weight = cond_stage_forward, reg_weight
        self.scale_by_std = scale_by_std
        if scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(float(scale_factor)))
        else:
            self.scale_factor = float(scale_factor)
        self.first_stage_model = instantiate_from_config(first_stage_config).eval().requires_grad_(False)
        if cond_stage_config == "__is_first_stage__":
            self.cond_stage_model = self.first_stage_model
        else:
            self.cond_stage_model = instantiate_from_config(cond_stage_config)
        self.is_tuned = bool(train_level or tuning)  # else what learns is a model of its own, not a change of another
        whole = ["unet", "embeder"] if cond_stage_trainable else ["unet"]
        self.families = families(train_level, tuning) if self.is_tuned else families(whole, None)
        self.use_ema = use_ema
        freeze_rest(self, self.learning())
        self._install(use_ema, ckpt_path)
        if not BASE_IS_COMING.get():
            self.tune()

    def tune(self) -> None:
        """Install the families on the base weights; from here on only what they let learn has gradients."""
        for chosen in self.families:
            chosen.family.install(self)
        freeze_rest(self, self.learning())
        if self.use_ema and not self.model_ema.tracks(self.model):
            self.model_ema = LitEma(self.model)

    def learning(self) -> dict[str, nn.Parameter]:
        """What the families let learn, by state-dict name."""
        return trainable(self, self.families) | self._own()

    def _own(self) -> dict[str, nn.Parameter]:
        return {"logvar": self.logvar} if self.learn_logvar else {}

    def _shares(self) -> list[tuple[Chosen, dict[str, nn.Parameter]]]:
        return list(zip(self.families, shares(self, self.families), strict=True))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """A group for each learning rate that families have of their own; whatever has none is in the first one."""
        groups: dict[float | None, list[nn.Parameter]] = {None: list(self._own().values())}
        for chosen, own in self._shares():
            groups.setdefault(chosen.learning_rate, []).extend(own.values())
        rates = {rate: {} if rate is None else {"lr": rate} for rate in groups}
        return [{"params": parameters} | rates[rate] for rate, parameters in groups.items() if parameters]

    # --- stages: outside its steps a family's parameters have no gradient, so that no optimizer touches them.
    # Who learns is a function of the step alone: a run resumes within any stage.

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        resting = [chosen for chosen in self.families if not chosen.learns_at(self.global_step)]
        if resting:
            active = trainable(self, [chosen for chosen in self.families if chosen not in resting])
            for name, parameter in trainable(self, resting).items():
                if name not in active:
                    parameter.grad = None

    def after_step(self, step: int, optimizer: Any) -> None:
        for chosen in (one for one in self.families if one.learns_at(step) and hasattr(one.family, "after_step")):
            rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            learning = chosen.family.trainable(self).values()
            chosen.family.after_step(self, max((rates[id(p)] for p in learning), default=0.0))

    def train(self, mode: bool = True) -> LatentDiffusion:
        """Training mode for what learns; a frozen stage stays in evaluation mode."""
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
        """Latents, drawn from a posterior, at the scale that diffusion works at."""
        latents = encoder_posterior
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            latents = encoder_posterior.sample(noise=self.draws.normal(encoder_posterior.mean.shape))
        return self.scale_factor * latents

    @torch.no_grad()
    def decode_first_stage(self, z: Tensor) -> Tensor:
        """Pictures from latents."""
        return self.first_stage_model.decode(z / self.scale_factor)

    # --- the condition

    def get_learned_conditioning(self, c: Any) -> Any:
        """The condition as the UNet takes it, e.g. prompts to [b, tokens, d]."""
        encode = getattr(self.cond_stage_model, self.cond_stage_forward or "encode", self.cond_stage_model)
        encoded = encode(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def _condition(self, batch: Mapping[str, Any]) -> Any:
        if self.cond_stage_model is None:
            return None
        raw = {
            "class_label": lambda: batch,
            "caption": lambda: batch["caption"],
            "txt": lambda: batch["txt"],
        }.get(self.cond_stage_key, lambda: self.get_input(batch, self.cond_stage_key))
        return self.get_learned_conditioning(raw())

    def clean(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        pictures = self.get_input(batch, self.first_stage_key)
        return self.get_first_stage_encoding(self.encode_first_stage(pictures)).detach(), self._condition(batch)

    @torch.no_grad()
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """With `scale_by_std`, measure on the first batch which factor gives latents unit variance."""
        if self.scale_by_std and self.global_step == 0 and batch_idx == 0:
            latents, _ = self.clean(batch[0] if isinstance(batch, (list, tuple)) else batch)
            self.scale_factor.fill_(self.scale_factor / latents.std())
