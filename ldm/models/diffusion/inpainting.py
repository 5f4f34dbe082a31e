"""Inpainting: the UNet also gets a mask and the latents of the masked picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.checkpoints import read_weights
from ldm.errors import InputError
from ldm.models.building import load_base
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution

FIRST_CONVOLUTION = "model.diffusion_model.input_blocks.0.0.weight"
FIRST_CONVOLUTION_EMA = "model_ema.diffusion_modelinput_blocks00weight"


class LatentInpaintDiffusion(LatentDiffusion):
    """`LatentDiffusion` whose condition is the text and, as further channels of the UNet, `concat_keys` of the batch.

    Besides picture and text, a batch has `mask` [b, H, W, 1], 1 where the model paints, and `masked_image` [b, H, W,
    3], the picture with zeros there. The mask is reduced to the size of the latents by the top left pixel of each cell;
    the first stage encodes `masked_image_key`. The mask is only a condition and does not weight the loss. Channels have
    the published order: 4 noisy latents, 1 mask, 4 latents of the masked picture.

    `finetune_keys`: weights with `keep_finetune_dims` input channels in the checkpoint of a plain model; their other
    channels start at zero. Raises `InputError`.
    """

    def __init__(
        self,
        finetune_keys: Sequence[str] | None = (FIRST_CONVOLUTION, FIRST_CONVOLUTION_EMA),
        concat_keys: Sequence[str] = ("mask", "masked_image"),
        masked_image_key: str | None = "masked_image",
        keep_finetune_dims: int = 4,
        conditioning_key: str | None = "hybrid",
        **latent: Any,
    ) -> None:
        if conditioning_key != "hybrid":
            raise InputError(f"LatentInpaintDiffusion: conditioning_key must be hybrid, got {conditioning_key!r}")
        if not concat_keys or masked_image_key not in (None, *concat_keys):
            raise InputError(
                f"LatentInpaintDiffusion: masked_image_key {masked_image_key!r} must be among concat_keys "
                f"{list(concat_keys)}"
            )
        self.finetune_keys, self.keep_finetune_dims = tuple(finetune_keys or ()), keep_finetune_dims
        self.concat_keys, self.masked_image_key = tuple(concat_keys), masked_image_key
        super().__init__(conditioning_key=conditioning_key, **latent)

    def _load_base(self, path: str) -> dict[str, Tensor]:
        weights = dict(read_weights(path))
        own = self.state_dict()
        for name in self.finetune_keys:
            if name in weights and name in own and weights[name].shape[1] == self.keep_finetune_dims:
                widened = torch.zeros(own[name].shape, dtype=weights[name].dtype)
                widened[:, : self.keep_finetune_dims] = weights[name]
                weights[name] = widened
        return load_base(self, weights, source=str(path))

    def clean(self, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        latents, text = super().clean(batch)
        channels = [self.channels_of(batch, key, latents.shape[2:]) for key in self.concat_keys]
        return latents, {"c_concat": [torch.cat(channels, dim=1)], "c_crossattn": [text]}

    def channels_of(
        self, batch: Mapping[str, Any], key: str, size: Sequence[int], random: bool = True
    ) -> Tensor:
        """An entry of the batch as additional channels [b, c, h, w] of the latents.

        A picture is a sample of the autoencoder's posterior, or its mode unless `random`.
        """
        if key not in batch:
            raise InputError(f"the batch has no {key!r}, which this inpainting model is conditioned on")
        value = self.get_input(batch, key)
        if key != self.masked_image_key:
            return F.interpolate(value, size=tuple(size))
        posterior = self.encode_first_stage(value)
        if not random and isinstance(posterior, DiagonalGaussianDistribution):
            posterior = posterior.mode()
        return self.get_first_stage_encoding(posterior).detach()

    def masks_of(self, batches: Sequence[Mapping[str, Any]], drawn: Sequence[tuple]) -> list[Tensor | None]:
        """The batch's `mask` is a condition; only `loss_mask` weighs the loss."""
        weighed = [{key: batch[key] for key in ("loss_mask",) if key in batch} for batch in batches]
        return super().masks_of(weighed, drawn)


def painting_condition(model: LatentDiffusion, text: Any, picture: Tensor, mask: Tensor) -> Any:
    """The condition of an inpainting model, for prompts that are encoded as `text`.

    picture [b, 3, H, W] in [-1, 1]; mask [b, 1, H, W], 1 where the model paints. `LatentInpaintDiffusion` gets channels
    and text. A model that is conditioned only on channels (LDM's inpainting model) gets the latents of the masked
    picture and the mask in [-1, 1]. Raises `InputError` for other keys.
    """
    masked = picture * (mask < 0.5)
    if not isinstance(model, LatentInpaintDiffusion):
        latents = model.cond_stage_model.encode(masked)
        return torch.cat([latents, F.interpolate(2 * mask - 1, size=latents.shape[-2:])], dim=1)
    held = {"mask": mask, "masked_image": masked}
    if unknown := set(model.concat_keys) - held.keys():
        raise InputError(f"this model is conditioned on {', '.join(sorted(unknown))}, which a picture and a mask lack")
    batch = {key: value.permute(0, 2, 3, 1) for key, value in held.items()}
    size = tuple(side // model.first_stage_model.downsampling_factor for side in picture.shape[2:])
    # the mode: a seed gives the same picture in any batch
    channels = torch.cat([model.channels_of(batch, key, size, random=False) for key in model.concat_keys], dim=1)
    return {"c_concat": [channels], "c_crossattn": [text]}


def sees_mask(model: Any) -> bool:
    """Whether picture and mask are part of a model's condition, i.e. it is an inpainting model."""
    return isinstance(model, LatentInpaintDiffusion) or (
        getattr(model.model, "conditioning_key", None) == "concat" and model.cond_stage_model is model.first_stage_model
    )
