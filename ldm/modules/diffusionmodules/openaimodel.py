"""The UNet of latent diffusion: residual blocks with time embedding, attention, skip connections (2112.10752)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.modules import adapter_files
from ldm.modules.adapters import attach_adapters, tapped_blocks
from ldm.modules.attention import SpatialTransformer
from ldm.modules.convolution import Conv2d
from ldm.modules.diffusionmodules.labels import check_labels, label_embedding
from ldm.modules.diffusionmodules.levels import Level, levels_of, one_width
from ldm.modules.diffusionmodules.util import normalization, timestep_embedding
from ldm.modules.parts import checkpoint, refuse_sizes, zero_module
from ldm.modules.taps import TappedBlock


class Upsample(nn.Module):
    """Twice the height and width by repetition, then a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = Conv2d(channels, out_channels or channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """Half the height and width by a strided 3x3 convolution, or by averaging unless `use_conv`."""

    def __init__(self, channels: int, use_conv: bool, out_channels: int | None = None) -> None:
        super().__init__()
        self.op = Conv2d(channels, out_channels or channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(TappedBlock):
    """Two 3x3 convolutions around a residual path, shifted (or scaled and shifted) by the time embedding.

    With `up` or `down` the resolution changes within the block.
    """

    positions = {"resi": "picture features", "reso": "picture features"}
    writable = ("resi", "reso")
    first_adapter = "adapter"

    def __init__(
        self,
        channels: int,
        emb_channels: int,
        dropout: float,
        out_channels: int | None = None,
        use_scale_shift_norm: bool = False,
        use_checkpoint: bool | str = False,
        up: bool = False,
        down: bool = False,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.channels, self.out_channels = channels, out_channels or channels
        self.use_scale_shift_norm, self.use_checkpoint = use_scale_shift_norm, use_checkpoint
        self.in_layers = nn.Sequential(
            normalization(channels, norm_num_groups), nn.SiLU(), Conv2d(channels, self.out_channels, 3, padding=1)
        )
        if up or down:
            self.h_upd = Upsample(channels, use_conv=False) if up else Downsample(channels, use_conv=False)
            self.positions = {"resi": "features before resampling", "reso": "features after resampling"}
        else:
            self.h_upd = nn.Identity()
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, self.out_channels * (2 if use_scale_shift_norm else 1))
        )
        self.out_layers = nn.Sequential(
            normalization(self.out_channels, norm_num_groups),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_module(Conv2d(self.out_channels, self.out_channels, 3, padding=1)),
        )
        same = self.out_channels == channels
        self.skip_connection = nn.Identity() if same else Conv2d(channels, self.out_channels, 1)

    def width(self, position: str) -> int:
        """Channels of the value at a position."""
        return {"resi": self.channels, "reso": self.out_channels}[position]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Features [b, channels, h, w] and time embedding [b, emb_channels] to features [b, out_channels, h', w']."""
        return checkpoint(self._forward, (x, emb), self.use_checkpoint)

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        tap = self.taps()
        x = tap("resi", x)
        norm, activation, conv = self.in_layers
        h = conv(self.h_upd(activation(norm(x))))
        h = self._modulate(h, self.emb_layers(emb)[:, :, None, None])
        return tap("reso", self.skip_connection(self.h_upd(x)) + h)

    def _modulate(self, h: Tensor, emb: Tensor) -> Tensor:
        if not self.use_scale_shift_norm:
            return self.out_layers(h + emb)
        scale, shift = emb.chunk(2, dim=1)
        return self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)


class AttentionBlock(nn.Module):
    """Self-attention over a picture [b, c, h, w], without text: the attention of unconditional latent diffusion.

    Channels of the fused projection are ordered (head, q/k/v, d), or (q/k/v, head, d) with `use_new_attention_order`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int = -1,
        use_checkpoint: bool | str = False,
        use_new_attention_order: bool = False,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads if num_head_channels == -1 else channels // num_head_channels
        if not self.num_heads or channels % self.num_heads:
            raise InputError(
                f"UNetModel: num_heads {num_heads}, num_head_channels {num_head_channels} do not divide {channels} "
                "channels of a level with attention"
            )
        self.use_checkpoint = use_checkpoint
        self.order = "(qkv heads d)" if use_new_attention_order else "(heads qkv d)"
        self.norm = normalization(channels, norm_num_groups)
        self.qkv = nn.Conv1d(channels, channels * 3, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._forward, (x,), self.use_checkpoint)

    def _forward(self, x: Tensor) -> Tensor:
        tokens = self.qkv(self.norm(rearrange(x, "b c h w -> b c (h w)")))
        q, k, v = rearrange(tokens, f"b {self.order} n -> qkv b heads n d", qkv=3, heads=self.num_heads)
        h = F.scaled_dot_product_attention(q, k, v)
        h = self.proj_out(rearrange(h, "b heads n d -> b (heads d) n"))
        return x + h.view_as(x)


class TimestepEmbedSequential(nn.Sequential):
    """A sequence of layers: residual blocks also get the time embedding, transformers also get the context."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


@dataclass(frozen=True)
class Layers:
    """Builds the layers of a UNet from their common settings."""

    residual: Mapping[str, Any]  # arguments of every `ResBlock`
    attention: Mapping[str, Any]  # arguments of every `SpatialTransformer`, or `AttentionBlock` without context
    has_context: bool
    num_heads: int
    num_head_channels: int
    resize_by_residual: bool
    resize_by_convolution: bool

    def res_block(self, channels: int, out: int) -> ResBlock:
        return ResBlock(channels, out_channels=out, **self.residual)

    def attend(self, level: Level) -> nn.Module:
        channels, heads = level.width, self.num_heads
        if not self.has_context:
            return AttentionBlock(channels, heads, **self.attention)
        heads = heads if self.num_head_channels == -1 else channels // self.num_head_channels
        if not 1 <= heads <= channels:
            asked = f"num_heads {heads}" if heads else f"num_head_channels {self.num_head_channels}"
            raise InputError(f"UNetModel: {asked} is more than the {channels} channels of a level with attention")
        return SpatialTransformer(
            channels, heads, channels // heads, level.depth, disable_self_attn=level.without_self, **self.attention
        )

    def down(self, channels: int) -> nn.Module:
        if self.resize_by_residual:
            return ResBlock(channels, out_channels=channels, down=True, **self.residual)
        return Downsample(channels, self.resize_by_convolution)

    def up(self, channels: int) -> nn.Module:
        if self.resize_by_residual:
            return ResBlock(channels, out_channels=channels, up=True, **self.residual)
        return Upsample(channels, self.resize_by_convolution)


def input_blocks(
    stem: nn.Module, channels: int, levels: Sequence[Level], layers: Layers
) -> tuple[nn.ModuleList, list[int]]:
    """The blocks of the way down, `stem` first, and the channels of their outputs."""
    blocks, widths = nn.ModuleList([TimestepEmbedSequential(stem)]), [channels]
    for number, level in enumerate(levels):
        if number:
            blocks.append(TimestepEmbedSequential(layers.down(widths[-1])))
            widths.append(widths[-1])
        for i in range(level.res_blocks):
            block = [layers.res_block(widths[-1], level.width)]
            if i < level.attention_blocks:
                block.append(layers.attend(level))
            blocks.append(TimestepEmbedSequential(*block))
            widths.append(level.width)
    return blocks, widths


def middle_block(level: Level, layers: Layers) -> TimestepEmbedSequential:
    first = layers.res_block(level.width, level.width)
    attention = [layers.attend(level)] if level.attention_blocks else []
    return TimestepEmbedSequential(first, *attention, layers.res_block(level.width, level.width))


def output_blocks(skips: Sequence[int], levels: Sequence[Level], layers: Layers) -> nn.ModuleList:
    """The blocks of the way up. Each also gets an output of the way down, whose channels are `skips`, in reverse."""
    blocks, skips, channels = nn.ModuleList(), list(skips), levels[-1].width
    for number, level in reversed(list(enumerate(levels))):
        for i in range(level.res_blocks + 1):
            block = [layers.res_block(channels + skips.pop(), level.width)]
            channels = level.width
            if i < level.attention_blocks:
                block.append(layers.attend(level))
            if number and i == level.res_blocks:
                block.append(layers.up(channels))
            blocks.append(TimestepEmbedSequential(*block))
    return blocks


class UNetModel(nn.Module):
    """Epsilon-prediction eps(x_t, t, context) with LDM's constructor arguments and state-dict names.

    `attention_resolutions` are downsampling rates at which attention is used; `num_heads` or `num_head_channels` must
    be given. `norm_num_groups`, diffusers' name, is new: narrow networks need fewer than LDM's 32 groups.
    `adapter_config` attaches position adapters (see `ldm.modules.adapters`).

    `num_res_blocks`, `transformer_depth`, `num_attention_blocks` and `disable_self_attentions` may have one entry per
    level, from the finest one; levels without attention ignore theirs. The middle block has the depth
    `transformer_depth_middle`, by default that of the last level. `num_classes` says what y is (`labels.LABELS`).
    Raises `InputError` for arguments that contradict each other.
    """

    def __init__(
        self,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int | Sequence[int],
        attention_resolutions: Sequence[int],
        image_size: int | None = None,  # unused; accepted because LDM's YAML files have it
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | str | None = None,
        use_checkpoint: bool | str = False,
        use_fp16: bool = False,  # unused, as `use_bf16`: the dtype is that of the weights, `.half()` changes it
        use_bf16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool | None = None,  # None: if there is a context_dim, as in sgm
        transformer_depth: int | Sequence[int] = 1,
        context_dim: int | Sequence[int] | None = None,
        n_embed: int | None = None,
        legacy: bool = True,  # unused: in LDM it chooses between two equivalent ways to give the width of heads
        disable_self_attentions: Sequence[bool] | None = None,
        num_attention_blocks: Sequence[int] | None = None,
        disable_middle_self_attn: bool = False,
        disable_middle_transformer: bool = False,
        use_linear_in_transformer: bool = False,
        spatial_transformer_attn_type: str = "softmax",
        adm_in_channels: int | None = None,
        transformer_depth_middle: int | None = None,
        offload_to_cpu: bool = False,
        norm_num_groups: int = 32,
        adapter_config: Mapping | None = None,
    ) -> None:
        super().__init__()
        if dims != 2 or n_embed is not None or offload_to_cpu:
            raise InputError("UNetModel: only dims=2, n_embed=null and offload_to_cpu=false are supported")
        refuse_sizes(
            "UNetModel", in_channels=in_channels, model_channels=model_channels, out_channels=out_channels,
            num_res_blocks=num_res_blocks, channel_mult=channel_mult, context_dim=context_dim,
            transformer_depth=transformer_depth, adm_in_channels=adm_in_channels, norm_num_groups=norm_num_groups,
            **{name: value for name, value in (
                ("num_heads", num_heads), ("num_head_channels", num_head_channels),
                ("num_heads_upsample", num_heads_upsample),
            ) if value != -1},
        )  # fmt: skip
        has_context = context_dim is not None
        if use_spatial_transformer not in (None, has_context):
            raise InputError("UNetModel: use_spatial_transformer and context_dim go together; give both or neither")
        if num_heads == -1 and num_head_channels == -1:
            raise InputError("UNetModel: give num_heads or num_head_channels")
        if spatial_transformer_attn_type not in ("softmax", "softmax-xformers"):  # two ways to compute the same
            raise InputError(
                "UNetModel: spatial_transformer_attn_type must be softmax or softmax-xformers, got "
                f"{spatial_transformer_attn_type!r}"
            )
        self.image_size, self.in_channels, self.out_channels = image_size, in_channels, out_channels
        self.model_channels, self.num_classes, self.context_dim = model_channels, num_classes, one_width(context_dim)
        self.adm_in_channels = adm_in_channels
        emb_channels = model_channels * 4
        levels = levels_of(
            model_channels, channel_mult, attention_resolutions, num_res_blocks, num_attention_blocks,
            transformer_depth, disable_self_attentions,
        )  # fmt: skip
        middle = replace(
            levels[-1],
            attention_blocks=not disable_middle_transformer,
            depth=levels[-1].depth if transformer_depth_middle is None else transformer_depth_middle,
            without_self=disable_middle_self_attn,
        )
        layers = Layers(
            residual={
                "emb_channels": emb_channels, "dropout": dropout, "use_scale_shift_norm": use_scale_shift_norm,
                "use_checkpoint": use_checkpoint, "norm_num_groups": norm_num_groups,
            },
            attention={"use_checkpoint": use_checkpoint, "norm_num_groups": norm_num_groups} | (
                {"context_dim": self.context_dim, "use_linear": use_linear_in_transformer} if has_context
                else {"num_head_channels": num_head_channels, "use_new_attention_order": use_new_attention_order}
            ),
            has_context=has_context, num_heads=num_heads, num_head_channels=num_head_channels,
            resize_by_residual=resblock_updown, resize_by_convolution=conv_resample,
        )  # fmt: skip
        heads_up = num_heads if num_heads_upsample == -1 or has_context else num_heads_upsample

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = label_embedding(num_classes, adm_in_channels, model_channels, emb_channels)
        stem = Conv2d(in_channels, model_channels, 3, padding=1)
        self.input_blocks, skips = input_blocks(stem, model_channels, levels, layers)
        self.middle_block = middle_block(middle, layers)
        self.output_blocks = output_blocks(skips, levels, replace(layers, num_heads=heads_up))
        self.out = nn.Sequential(
            normalization(levels[0].width, norm_num_groups),
            nn.SiLU(),
            zero_module(Conv2d(model_channels, out_channels, 3, padding=1)),
        )
        self.downsampling_factor = 2 ** (len(levels) - 1)  # height and width must be multiples of it
        attach_adapters(self, adapter_config)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the network computes in."""
        return next(self.time_embed.parameters()).dtype

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Noisy latents [b, c, h, w], steps [b], context [b, m, context_dim], labels y to a prediction [b, c, h, w].

        y: classes [b], or vectors [b, adm_in_channels] where `num_classes` is sequential, see `labels.LABELS`.
        Raises `InputError` unless height and width are multiples of `downsampling_factor` and context and y fit.
        """
        self.check(x, context, y)
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.dtype))
        if y is not None:
            y = y if isinstance(self.num_classes, int) else y.to(self.dtype)
            emb = emb + self.label_emb(y)
        h, skips = x.to(self.dtype), []
        context = context if context is None else context.to(self.dtype)
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h).to(x.dtype)

    def check(self, x: Tensor, context: Tensor | None, y: Tensor | None) -> None:
        """Raises `InputError` for inputs of the forward pass that do not fit the config."""
        if x.shape[-2] % self.downsampling_factor or x.shape[-1] % self.downsampling_factor:
            raise InputError(
                f"latents of {x.shape[-2]} x {x.shape[-1]} do not fit this UNet: it needs multiples of "
                f"{self.downsampling_factor}; choose another size of pictures"
            )
        if None not in (context, self.context_dim) and context.shape[-1] != self.context_dim:
            raise InputError(
                f"the condition has {context.shape[-1]} channels, this UNet's context_dim is {self.context_dim}: "
                "set unet_config.params.context_dim to what the encoder of the condition gives"
            )
        check_labels(y, len(x), self.num_classes, self.adm_in_channels)

    def adapters_enable(self, enabled: bool = True) -> None:
        """Switch all adapters on or off; off gives the base model exactly."""
        for _, block in tapped_blocks(self):
            block.adapters_enabled = enabled

    def save_adapter_to_dir(self, path: str | Path, **notes) -> None:
        """Write the adapters to a folder, see `ldm.modules.adapter_files`. `notes` (step, ...) go into its JSON."""
        adapter_files.save(self, path, notes)

    def load_adapter_from_dir(self, path: str | Path, scale: float = 1.0, add: bool = False) -> None:
        """Read such a folder, or one of the published code. Raises `InputError` if it does not fit this model.

        `scale` multiplies the scale of each adapter. A model without adapters takes those of the folder. A model with
        adapters must have the same ones; `add` attaches those of the folder beside them instead.
        """
        adapter_files.load(self, path, scale, add)
