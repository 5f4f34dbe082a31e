"""Custom Diffusion: the cross-attention of the UNet learns to read a new concept (arXiv 2212.04488, section 3.2)."""

from __future__ import annotations

from ldm.tuning.full import ByName
from ldm.util import InputError

# `freeze_model` of the published YAML names what is *not* frozen. New tokens beside it: `ldm.tuning.textual_inversion`.
PARTS = {"crossattn-kv": r"\.attn2\.to_[kv]\.weight$", "crossattn": r"\.attn2\."}


class CrossAttention(ByName):
    """`crossattn-kv`: keys and values, which read the text; `crossattn`: all weights of the cross-attention."""

    def __init__(self, freeze_model: str = "crossattn-kv") -> None:
        if freeze_model not in PARTS:
            raise InputError(f"freeze_model must be one of {', '.join(PARTS)}, got {freeze_model!r}")
        super().__init__(r"^model\.diffusion_model\..*" + PARTS[freeze_model])
