"""The one mapping between the names of LDM's layers and those of diffusers: UNet, autoencoder, text encoder.

A table maps dotted prefixes: the longest prefix of a name is replaced, the rest is kept. The same tables serve modules
and parameters, in both directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ldm.errors import InputError
from ldm.models import bases

UNET, VAE, TEXT = bases.UNET, bases.FIRST_STAGE, bases.TEXT

RESNET = {  # LDM's residual block -> diffusers'
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


@dataclass(frozen=True)
class UNetLayout:
    """What the names of a UNet depend on: residual blocks per level, and which levels (finest first) have attention."""

    res_blocks: int = 2
    attention: tuple[bool, ...] = (True, True, True, False)  # Stable Diffusion v1

    @property
    def levels(self) -> int:
        """The number of resolutions."""
        return len(self.attention)


def layout_of(names: Iterable[str]) -> UNetLayout:
    """The layout of a UNet from LDM's names of its layers or parameters. Raises `InputError`."""
    names = [name.removeprefix(UNET) for name in names]
    blocks = {int(m[1]) for m in map(re.compile(r"input_blocks\.(\d+)\.").match, names) if m}
    downs = {int(m[1]) for m in map(re.compile(r"input_blocks\.(\d+)\.0\.op").match, names) if m}
    if not blocks:
        raise InputError("this model has no input_blocks: expected the UNet of a latent diffusion model")
    step = min(downs, default=len(blocks))
    starts = range(1, len(blocks), step)
    attention = tuple(
        any(n.startswith(f"input_blocks.{start}.1.transformer_blocks") for n in names) for start in starts
    )
    if len(blocks) != step * len(attention):
        raise InputError(f"this UNet has {len(blocks)} input blocks, which no layout of equal levels gives")
    return UNetLayout(step - 1, attention)


def layout_of_diffusers(names: Iterable[str]) -> UNetLayout:
    """The layout of a UNet from diffusers' names of all its parameters. Raises `InputError`."""
    names = list(names)
    resnets = [m.groups() for m in map(re.compile(r"down_blocks\.(\d+)\.resnets\.(\d+)\.").match, names) if m]
    if not resnets:
        raise InputError("this model has no down_blocks: expected the UNet of a diffusers model")
    levels, count = (1 + max(int(number) for number in column) for column in zip(*resnets, strict=True))
    attend = {int(m[1]) for m in map(re.compile(r"down_blocks\.(\d+)\.attentions\.").match, names) if m}
    return UNetLayout(count, tuple(level in attend for level in range(levels)))


def layout_of_attention(names: Iterable[str]) -> UNetLayout:
    """The layout from LDM's names of attention layers alone."""
    names = [name.removeprefix(UNET) for name in names]
    ins, outs = (
        {int(m[1]) for m in map(re.compile(rf"{half}put_blocks\.(\d+)\.1\.").match, names) if m}
        for half in ("in", "out")
    )
    if not ins or not outs:
        raise InputError(f"expected names of attention layers such as input_blocks.1.1...., got {', '.join(names[:3])}")
    first = min(ins)
    step = next(i for i in range(1, len(ins) + 2) if first + i not in ins) + 1
    levels = (first - 1) // step + (max(outs) + 1) // step  # finer levels than the first one have no attention
    return UNetLayout(step - 1, tuple(1 + level * step in ins for level in range(levels)))


def layout_of_diffusers_attention(names: Iterable[str]) -> UNetLayout:
    """The same for diffusers' names."""
    names = list(names)
    downs, ups = (
        [m.groups() for m in map(re.compile(rf"{half}_blocks\.(\d+)\.attentions\.(\d+)\.").match, names) if m]
        for half in ("down", "up")
    )
    if not downs or not ups:
        raise InputError(f"expected names such as down_blocks.0.attentions.0...., got {', '.join(names[:3])}")
    attend = {int(level) for level, _ in downs}
    levels = 1 + max(int(level) for level, _ in ups) + min(attend)  # finer levels than the first one have none
    return UNetLayout(1 + max(int(i) for _, i in downs), tuple(level in attend for level in range(levels)))


def unet_table(layout: UNetLayout) -> dict[str, str]:
    """Prefixes of LDM's UNet -> diffusers'. Within attention blocks the names are the same."""
    table = {
        "input_blocks.0.0": "conv_in",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",  # SDXL's vector
        "label_emb.0.2": "add_embedding.linear_2",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    step = layout.res_blocks + 1
    for level, attends in enumerate(layout.attention):
        for i in range(layout.res_blocks):
            block = f"input_blocks.{1 + level * step + i}"
            resnets[f"{block}.0"] = f"down_blocks.{level}.resnets.{i}"
            if attends:
                table[f"{block}.1"] = f"down_blocks.{level}.attentions.{i}"
        if level < layout.levels - 1:
            table[f"input_blocks.{(level + 1) * step}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for level, attends in enumerate(reversed(layout.attention)):  # the decoder starts at the coarsest level
        for i in range(step):
            block = f"output_blocks.{level * step + i}"
            resnets[f"{block}.0"] = f"up_blocks.{level}.resnets.{i}"
            if attends:
                table[f"{block}.1"] = f"up_blocks.{level}.attentions.{i}"
        if level < layout.levels - 1:
            table[f"{block}.{2 if attends else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table | _with_inner(resnets, RESNET)


def vae_table(levels: int = 4, res_blocks: int = 2) -> dict[str, str]:
    """Prefixes of LDM's autoencoder -> diffusers'."""
    table = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half, blocks, count, sampler in (
        ("encoder", "down", res_blocks, "down"),
        ("decoder", "up", res_blocks + 1, "up"),
    ):
        resnets = {f"{half}.mid.block_{i + 1}": f"{half}.mid_block.resnets.{i}" for i in range(2)}
        for level in range(levels):
            theirs = level if half == "encoder" else levels - 1 - level  # diffusers counts in forward order
            ours, theirs = f"{half}.{blocks}.{level}", f"{half}.{blocks}_blocks.{theirs}"
            resnets |= {f"{ours}.block.{i}": f"{theirs}.resnets.{i}" for i in range(count)}
            table[f"{ours}.{sampler}sample.conv"] = f"{theirs}.{sampler}samplers.0.conv"
        table |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.conv_out": f"{half}.conv_out"}
        table[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for ours, theirs in resnets.items():
            table |= {ours: theirs, f"{ours}.nin_shortcut": f"{theirs}.conv_shortcut"}
        table |= _with_inner({f"{half}.mid.attn_1": f"{half}.mid_block.attentions.0"}, VAE_ATTENTION)
    return table


def _with_inner(outer: Mapping[str, str], inner: Mapping[str, str]) -> dict[str, str]:
    return {f"{a}.{c}": f"{b}.{d}" for a, b in outer.items() for c, d in inner.items()}


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """The table for the other direction."""
    return {theirs: ours for ours, theirs in table.items()}


def translate(name: str, table: Mapping[str, str]) -> str | None:
    """A dotted name with its longest prefix in the table replaced; None if no prefix is in it."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        if (found := table.get(".".join(parts[:cut]))) is not None:
            return ".".join([found, *parts[cut:]])
    return None


def translate_all(names: Iterable[str], table: Mapping[str, str], source: str) -> dict[str, str]:
    """Every name with its translation. Raises `InputError` for names without one."""
    found = {name: translate(name, table) for name in names}
    if lost := [name for name, value in found.items() if value is None]:
        raise InputError(
            f"{source}: {len(lost)} names are not those of a Stable Diffusion model, e.g. {', '.join(lost[:3])}"
        )
    return found
