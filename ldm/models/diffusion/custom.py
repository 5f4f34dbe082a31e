"""The class that Custom Diffusion's published YAML files name. It only chooses families of tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldm.config import plain
from ldm.errors import InputError
from ldm.models.diffusion.ddpm import LatentDiffusion


class CustomDiffusion(LatentDiffusion):
    """`LatentDiffusion` with the arguments of arXiv 2212.04488 as shorthand for `tuning`.

    `freeze_model` names the part of the UNet that is trained (see `ldm.tuning.cross_attention`). With `add_token`, the
    words in `cond_stage_config.params.modifier_token` are trained too; they start at `init_word` (by default rare
    words). Then the rest of the text encoder is frozen; without `add_token`, `cond_stage_trainable` trains all of it.
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
