"""The condition of latent diffusion: text, class labels, pictures or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ldm.errors import InputError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.encoders.prompts import encode as encode_prompts
from ldm.modules.encoders.prompts import window_count


class Condition:
    """A mixin for a model with `cond_stage_model`, `cond_stage_key`, `cond_stage_forward` and `get_input`."""

    condition_name = "cond_stage_model"  # the attribute, and so the prefix of its weights in checkpoints

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode a condition for the UNet, e.g. prompts to [b, tokens, d]."""
        encode = getattr(self.cond_stage_model, self.cond_stage_forward or "encode", self.cond_stage_model)
        encoded = encode(c)
        return encoded.mode() if isinstance(encoded, DiagonalGaussianDistribution) else encoded

    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by their names in the state dict."""
        return {} if self.cond_stage_model is None else {self.condition_name: self.cond_stage_model}

    def replace_text_encoder(self, name: str, encoder: nn.Module) -> None:
        """Replace one of `text_encoders` by another encoder or a cache."""
        setattr(self, name, encoder)

    def conditions(
        self,
        prompts: Sequence[str],
        size: tuple[int, int],
        guided: bool = True,
        negative: Sequence[str] | None = None,
        weighted: bool = False,
    ) -> tuple[Any, Any]:
        """The conditions of prompts and, if `guided`, of negative ones, for pictures of `size` (height, width) pixels.

        `negative`: one for each prompt, by default empty. `weighted`: `(word:1.3)` is a weight. Prompts that are longer
        than the text encoder's window use several windows (`ldm.modules.encoders.prompts`) if the encoder supports it.
        """
        against = list(negative or [""] * len(prompts))
        encoder = self.cond_stage_model
        if hasattr(encoder, "encode_ids"):
            count = window_count(encoder, [*prompts, *(against if guided else [])], weighted)
            if weighted or count > 1:
                def encode(texts: Sequence[str]) -> Tensor:
                    return encode_prompts(encoder, texts, weighted, count)

                return encode(prompts), encode(against) if guided else None
        elif weighted:
            raise InputError(f"prompt weights need a CLIP text encoder, this model has {type(encoder).__name__}")
        return self.get_learned_conditioning(list(prompts)), self.get_learned_conditioning(against) if guided else None

    def _condition(self, batch: Mapping[str, Any], latents: Tensor) -> Any:
        if self.cond_stage_model is None:
            return None
        raw = {
            "class_label": lambda: batch,
            "caption": lambda: batch["caption"],
            "txt": lambda: batch["txt"],
        }.get(self.cond_stage_key, lambda: self.get_input(batch, self.cond_stage_key))
        return self.get_learned_conditioning(raw())
