"""Classifier-free guidance, as a wrapper around the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldm.errors import InputError

Denoise = Callable[[Tensor, Tensor], Tensor]


def guided(apply_model: Callable[[Tensor, Tensor, Any], Tensor], cond: Any, uncond: Any, scale: float) -> Denoise:
    """denoise(x [b, c, h, w], t [b]) -> predicted noise [b, c, h, w].

    `cond` and `uncond` are a tensor [b, ...], a list of those, or a dict of tensors and lists (LDM's hybrid
    conditioning `{"c_concat": [...], "c_crossattn": [...]}`). One call with the batch [uncond, cond], or a single
    conditional call where scale is 1 or uncond is None. Raises `InputError` if the two do not have the same form.
    """
    if uncond is None or scale == 1:
        # A copy, because samplers keep it: a model that replays CUDA graphs overwrites its last output.
        return lambda x, t: apply_model(x, t, cond).clone()
    both = batched(uncond, cond)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        eps_uncond, eps_cond = apply_model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)  # 2b c h w
        # Classifier-Free Diffusion Guidance (arXiv 2207.12598) Eq. 6, scale = 1 + w
        return eps_uncond + scale * (eps_cond - eps_uncond)

    return denoise


def batched(*parts: Any) -> Any:
    """Join conditionings of the same form: tensors along the batch, lists and dicts entry by entry."""
    first, *others = parts
    if all(isinstance(part, Tensor) for part in parts):
        if any(part.shape != first.shape for part in others):
            shapes = " and ".join(str(list(part.shape)) for part in parts)
            raise InputError(
                f"unconditional_conditioning and conditioning have the shapes {shapes}: "
                "guidance needs the same shape, so encode as many empty prompts as there are prompts"
            )
        return torch.cat(parts)
    if all(isinstance(part, dict) and part.keys() == first.keys() for part in parts):
        return {key: batched(*(part[key] for part in parts)) for key in first}
    if all(isinstance(part, (list, tuple)) and len(part) == len(first) for part in parts):
        return [batched(*entries) for entries in zip(*parts, strict=True)]
    raise InputError(
        f"unconditional_conditioning is {_form(first)}, the conditioning is {_form(parts[-1])}: "
        "guidance needs the same form for both"
    )


def _form(cond: Any) -> str:
    if isinstance(cond, dict):
        return f"a dict with {sorted(cond)}"
    if isinstance(cond, (list, tuple)):
        return f"a list of {len(cond)}"
    return f"a {type(cond).__name__}"
