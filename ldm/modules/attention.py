"""The UNet's transformer: self-attention over the picture, cross-attention to the text, feed-forward (2112.10752)."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.modules.convolution import Conv2d
from ldm.modules.parts import checkpoint, zero_module
from ldm.modules.taps import TappedBlock


class CrossAttention(nn.Module):
    """Multi-head attention from tokens [b, n, query_dim] to a context [b, m, context_dim], by default themselves."""

    def __init__(
        self, query_dim: int, context_dim: int | None = None, heads: int = 8, dim_head: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = heads * dim_head
        context_dim = context_dim or query_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner_dim, query_dim), nn.Dropout(dropout))

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[b, m, context_dim] -> [b, m, heads * d] twice; `ldm.modules.cached_text` computes them once per text."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = (
            rearrange(t, "b n (heads d) -> b heads n d", heads=self.heads)
            for t in (self.to_q(x), *self.keys_and_values(x if context is None else context))
        )
        h = F.scaled_dot_product_attention(q, k, v)  # arXiv 1706.03762, eq. 1
        return self.to_out(rearrange(h, "b heads n d -> b n (heads d)"))


class GEGLU(nn.Module):
    """A linear layer gated by the exact GELU of another one (arXiv 2002.05202, eq. 6)."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """[b, n, dim] to [b, n, dim_out] through `mult` times the width."""

    def __init__(
        self, dim: int, dim_out: int | None = None, mult: int = 4, glu: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        inner_dim = dim * mult
        widen = GEGLU(dim, inner_dim) if glu else nn.Sequential(nn.Linear(dim, inner_dim), nn.GELU())
        self.net = nn.Sequential(widen, nn.Dropout(dropout), nn.Linear(inner_dim, dim_out or dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(TappedBlock):
    """Self-attention, cross-attention, feed-forward, each around a residual path (figure 2 of arXiv 2303.18181)."""

    positions = {
        "attn1i": "picture features",  # SA_in
        "attn1o": "picture features",  # SA_out
        "attn2i": "picture features",  # CA_in
        "attn2c": "text context",  # CA_c
        "attn2o": "picture features",  # CA_out
        "ffni": "picture features",  # FFN_in
        "ffno": "picture features",  # FFN_out
        "transo": "picture features",  # Trans_out
    }
    writable = ("attn1i", "attn2i", "attn2c", "ffni", "transo")
    first_adapter = "adapter_inout"

    def __init__(
        self,
        dim: int,
        n_heads: int,
        d_head: int,
        dropout: float = 0.0,
        context_dim: int | None = None,
        gated_ff: bool = True,
        checkpoint: bool | str = True,
        disable_self_attn: bool = False,  # the first attention is to the context, too
    ) -> None:
        super().__init__()
        self.dim, self.context_dim, self.checkpoint = dim, context_dim, checkpoint
        self.disable_self_attn = disable_self_attn
        first = context_dim if disable_self_attn else None
        self.attn1 = CrossAttention(dim, first, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.ff = FeedForward(dim, dropout=dropout, glu=gated_ff)
        self.attn2 = CrossAttention(dim, context_dim, heads=n_heads, dim_head=d_head, dropout=dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def width(self, position: str) -> int:
        """Channels of the value at a position. Raises `InputError` for the context of a block that has none."""
        if position != "attn2c":
            return self.dim
        if self.context_dim is None:
            raise InputError("attn2c: this model has no text context (its context_dim is not set)")
        return self.context_dim

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Tokens [b, n, dim] and context [b, m, context_dim] to tokens [b, n, dim]."""
        return checkpoint(self._forward, (x, context), self.checkpoint)

    def _forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        tap = self.taps()
        x = tap("attn1i", x)
        h = tap("attn1o", self.attn1(self.norm1(x), context if self.disable_self_attn else None))
        x = tap("attn2i", x + h)
        c = tap("attn2c", context)
        h = tap("attn2o", self.attn2(self.norm2(x), c))
        x = tap("ffni", x + h)
        h = tap("ffno", self.ff(self.norm3(x)))
        return tap("transo", x + h)


class SpatialTransformer(nn.Module):
    """A picture [b, c, h, w] as tokens through transformer blocks, and back, around a residual path.

    With `use_linear` the projections in and out are linear layers over tokens (SD 2.x, SDXL), else 1x1 convolutions.
    """

    def __init__(
        self,
        in_channels: int,
        n_heads: int,
        d_head: int,
        depth: int = 1,
        dropout: float = 0.0,
        context_dim: int | None = None,
        use_checkpoint: bool | str = False,
        norm_num_groups: int = 32,
        use_linear: bool = False,
        disable_self_attn: bool = False,
    ) -> None:
        super().__init__()
        inner_dim = n_heads * d_head
        self.in_channels, self.use_linear = in_channels, use_linear
        self.norm = nn.GroupNorm(norm_num_groups, in_channels, eps=1e-6)
        project = nn.Linear if use_linear else partial(Conv2d, kernel_size=1)
        self.proj_in = project(in_channels, inner_dim)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner_dim, n_heads, d_head, dropout, context_dim,
                checkpoint=use_checkpoint, disable_self_attn=disable_self_attn,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.proj_out = zero_module(project(inner_dim, in_channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        h = self.proj_in(to_tokens(h)) if self.use_linear else to_tokens(self.proj_in(h))
        for block in self.transformer_blocks:
            h = block(h, context)
        h = to_picture(self.proj_out(h), x) if self.use_linear else self.proj_out(to_picture(h, x))
        return x + h


def to_tokens(x: Tensor) -> Tensor:
    """[b, c, h, w] -> [b, h w, c]."""
    return rearrange(x, "b c h w -> b (h w) c")


def to_picture(tokens: Tensor, like: Tensor) -> Tensor:
    """[b, h w, c] -> [b, c, h, w], with the height of `like`."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=like.shape[2])
