"""Custom Diffusion as its published YAML files name it; everything it does is in the families that it chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.config import plain
from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion


class CustomDiffusion(LatentDiffusion):
    """`LatentDiffusion` with the shorthands of arXiv 2212.04488 for `tuning`.

    `freeze_model` names the part of the UNet that learns (see `ldm.tuning.cross_attention`). With `add_token` the words
    in `cond_stage_config.params.modifier_token` learn, too, from `init_word` on (by default rare words); of the text
    encoder nothing else does, whatever `cond_stage_trainable` says. Without it, that lets all of it learn.
    """

    def __init__(
        self,
        cond_stage_config: Mapping,
        freeze_model: str = "crossattn-kv",
        add_token: bool = False,
        init_word: str | None = None,
        cond_stage_trainable: bool = False,
        tuning: Mapping | Sequence[Mapping] | None = None,
        **more: Any,
    ) -> None:
        chosen: list[Any] = [
            {"target": "ldm.tuning.cross_attention.CrossAttention", "params": {"freeze_model": freeze_model}}
        ]
        if add_token:
            words = (cond_stage_config.get("params") or {}).get("modifier_token")
            if not words:
                raise InputError(
                    "add_token: name the words as cond_stage_config.params.modifier_token, e.g. <new1>+<new2>"
                )
            params = {"modifier_token": words} | ({"init_word": init_word} if init_word else {})
            chosen.append({"target": "ldm.tuning.cross_attention.ModifierTokens", "params": params})
        elif cond_stage_trainable:
            chosen.append({"target": "ldm.tuning.full.ConditionStage"})
        further = plain(tuning) or []
        chosen += [further] if isinstance(further, Mapping) else further
        super().__init__(cond_stage_config=cond_stage_config, tuning=chosen, **more)
