"""The resolutions of a UNet, read from LDM's constructor arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldm.errors import InputError


@dataclass(frozen=True)
class Level:
    """The blocks of a UNet at one resolution."""

    width: int  # channels
    res_blocks: int  # on the way down; there is one more on the way up
    attention_blocks: int  # the number of residual blocks that are followed by attention
    depth: int  # transformer blocks of each attention
    without_self: bool  # attention to the context alone


def levels_of(
    model_channels: int,
    channel_mult: Sequence[int],
    attention_resolutions: Sequence[int],
    num_res_blocks: int | Sequence[int],
    num_attention_blocks: Sequence[int] | None,
    transformer_depth: int | Sequence[int],
    disable_self_attentions: Sequence[bool] | None,
) -> list[Level]:
    """The levels of a UNet, the finest first, from LDM's arguments. Raises `InputError` for lists of another length."""
    count = len(channel_mult)
    res_blocks = per_level("num_res_blocks", num_res_blocks, count)
    depths = per_level("transformer_depth", transformer_depth, count)
    without_self = per_level("disable_self_attentions", disable_self_attentions or False, count)
    attention_blocks = per_level("num_attention_blocks", num_attention_blocks or max(res_blocks) + 1, count)
    return [
        Level(
            width=mult * model_channels,
            res_blocks=res_blocks[level],
            attention_blocks=attention_blocks[level] if 2**level in attention_resolutions else 0,
            depth=depths[level],
            without_self=without_self[level],
        )
        for level, mult in enumerate(channel_mult)
    ]


def per_level(name: str, value: Any, levels: int) -> list:
    """One value for each level. Raises `InputError` for a list of another length."""
    if not isinstance(value, Sequence):
        return [value] * levels
    if len(value) != levels:
        raise InputError(f"UNetModel: {name} has {len(value)} entries, channel_mult has {levels}: give one per level")
    return list(value)


def one_width(context_dim: int | Sequence[int] | None) -> int | None:
    """The width of the context. Raises `InputError` for different widths, because all blocks get the same context."""
    widths = set(context_dim) if isinstance(context_dim, Sequence) else {context_dim}
    if len(widths) != 1:
        raise InputError(f"UNetModel: context_dim must be one width, got {list(context_dim)}")
    return widths.pop()
