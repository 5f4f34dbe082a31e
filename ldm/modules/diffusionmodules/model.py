"""The convolutional encoder and decoder of the first stage: pictures to latents and back.

LDM (arXiv 2112.10752) App. G, after VQGAN (arXiv 2012.09841). Shapes: b batch, c channels, h w, n = h w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.errors import InputError
from ldm.modules.parts import refuse_sizes


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm of the first stage, with eps 1e-6; the UNet's residual blocks have 1e-5."""
    return nn.GroupNorm(num_groups=groups, num_channels=channels, eps=1e-6)


class Upsample(nn.Module):
    """Twice the height and width, nearest neighbour, then a 3x3 convolution if `with_conv`."""

    def __init__(self, in_channels: int, with_conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, in_channels, 3, padding=1) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # b c 2h 2w


class Downsample(nn.Module):
    """Half the height and width: a strided 3x3 convolution that pads right and bottom only, or average pooling."""

    def __init__(self, in_channels: int, with_conv: bool = True):
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=0)
        self.with_conv = with_conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1))) if self.with_conv else F.avg_pool2d(x, 2)  # b c h/2 w/2


class ResnetBlock(nn.Module):
    """Twice norm, SiLU, 3x3 convolution, beside a shortcut: b in_channels h w -> b out_channels h w."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0, norm_num_groups: int = 32):
        super().__init__()
        self.norm1 = group_norm(in_channels, norm_num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, norm_num_groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # Not an Identity: for equal widths, released checkpoints have no such layer.
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.same_width = in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return h + (x if self.same_width else self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Self-attention of all places in one head of the full width, beside a shortcut: b c h w -> b c h w."""

    def __init__(self, in_channels: int, norm_num_groups: int = 32):
        super().__init__()
        self.norm = group_norm(in_channels, norm_num_groups)
        self.q = nn.Conv2d(in_channels, in_channels, 1)
        self.k = nn.Conv2d(in_channels, in_channels, 1)
        self.v = nn.Conv2d(in_channels, in_channels, 1)
        self.proj_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))  # b 1 n c
        # "Attention Is All You Need" (arXiv 1706.03762) Eq. 1
        h = F.scaled_dot_product_attention(q, k, v)
        h = h.squeeze(1).transpose(1, 2).reshape(x.shape)  # b c h w
        return x + self.proj_out(h)


class LinearAttnBlock(nn.Module):
    """Attention with linear cost in the number of pixels, one head: b c h w -> b c h w. As in LDM, no shortcut.

    Efficient Attention (arXiv 1812.01243) Sec. 3.2, with the softmax on the keys alone. It has no norm to divide.
    """

    def __init__(self, in_channels: int, norm_num_groups: int = 32):
        super().__init__()
        self.to_qkv = nn.Conv2d(in_channels, 3 * in_channels, 1, bias=False)
        self.to_out = nn.Conv2d(in_channels, in_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(x).flatten(2).chunk(3, dim=1)  # b c n
        context = k.softmax(dim=-1) @ v.transpose(1, 2)  # b c c
        return self.to_out((context.transpose(1, 2) @ q).reshape(x.shape))


# The last one is the first, computed by another library.
ATTENTION = {"vanilla": AttnBlock, "linear": LinearAttnBlock, "none": nn.Identity, "vanilla-xformers": AttnBlock}


def parts(dropout: float, attn_type: str, norm_num_groups: int) -> tuple[Callable[[int, int], nn.Module], Callable]:
    """Two functions: one builds a residual block of two widths, one builds attention of a width (see `ATTENTION`).

    Raises `InputError` for another kind of attention.
    """
    if attn_type not in ATTENTION:
        raise InputError(f"unknown attn_type {attn_type!r} in ddconfig: expected {', '.join(ATTENTION)}")
    return (
        partial(ResnetBlock, dropout=dropout, norm_num_groups=norm_num_groups),
        partial(ATTENTION[attn_type], norm_num_groups=norm_num_groups),
    )


class Level(nn.Module):
    """`count` residual blocks at one resolution, each followed by attention if `attention` is given."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        count: int,
        block: Callable[[int, int], nn.Module],
        attention: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * count
        self.block = nn.ModuleList(block(widths[i], widths[i + 1]) for i in range(count))
        self.attn = nn.ModuleList(attention(out_channels) for _ in range(count) if attention)

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        return h


class Middle(nn.Module):
    """The blocks at the lowest resolution: residual, attention, residual."""

    def __init__(self, channels: int, block: Callable[[int, int], nn.Module], attention: Callable[[int], nn.Module]):
        super().__init__()
        self.block_1 = block(channels, channels)
        self.attn_1 = attention(channels)
        self.block_2 = block(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Pictures to latents: b in_channels h w -> b z_channels (twice as many if `double_z`) h/f w/f.

    f = 2 ** (len(ch_mult) - 1). The arguments are those of LDM's `ddconfig`, which encoder and decoder share; `out_ch`,
    `give_pre_end` and `tanh_out` are unused here. `norm_num_groups`, diffusers' name, is new: with LDM's 32 groups a
    narrow level would normalize each channel alone, and the mean colour of a picture would be lost.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        norm_num_groups: int = 32,
    ):
        super().__init__()
        refuse_sizes(
            "ddconfig", ch=ch, out_ch=out_ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, in_channels=in_channels,
            resolution=resolution, z_channels=z_channels, norm_num_groups=norm_num_groups,
        )  # fmt: skip
        block, attention = parts(dropout, "linear" if use_linear_attn else attn_type, norm_num_groups)
        widths = [ch] + [ch * m for m in ch_mult]

        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            attend = resolution // 2**i in attn_resolutions
            self.down.append(Level(widths[i], widths[i + 1], num_res_blocks, block, attention if attend else None))
        for level, width in zip(self.down[:-1], widths[1:], strict=False):
            level.downsample = Downsample(width, resamp_with_conv)
        self.mid = Middle(widths[-1], block, attention)
        self.norm_out = group_norm(widths[-1], norm_num_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels if double_z else z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down[:-1]:
            h = level.downsample(level(h))
        h = self.mid(self.down[-1](h))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Latents to pictures: b z_channels h w -> b out_ch fh fw, f = 2 ** (len(ch_mult) - 1).

    The arguments are those of LDM's `ddconfig`, which encoder and decoder share; `in_channels` and `double_z` are
    unused here. `give_pre_end` returns the features before the last norm, `tanh_out` applies tanh to the output.
    """

    def __init__(
        self,
        *,
        ch: int,
        out_ch: int,
        ch_mult: Sequence[int] = (1, 2, 4, 8),
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        in_channels: int,
        resolution: int,
        z_channels: int,
        double_z: bool = True,
        give_pre_end: bool = False,
        tanh_out: bool = False,
        use_linear_attn: bool = False,
        attn_type: str = "vanilla",
        norm_num_groups: int = 32,
    ):
        super().__init__()
        refuse_sizes(
            "ddconfig", ch=ch, out_ch=out_ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, in_channels=in_channels,
            resolution=resolution, z_channels=z_channels, norm_num_groups=norm_num_groups,
        )  # fmt: skip
        self.give_pre_end, self.tanh_out = give_pre_end, tanh_out
        block, attention = parts(dropout, "linear" if use_linear_attn else attn_type, norm_num_groups)
        widths = [ch * m for m in ch_mult]
        widths.append(widths[-1])

        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], block, attention)
        self.up = nn.ModuleList()  # up.0 has the full resolution and is the last to run
        for i in range(len(ch_mult)):
            attend = resolution // 2**i in attn_resolutions
            self.up.append(Level(widths[i + 1], widths[i], num_res_blocks + 1, block, attention if attend else None))
        for level, width in zip(self.up[1:], widths[1:], strict=False):
            level.upsample = Upsample(width, resamp_with_conv)
        self.norm_out = group_norm(widths[0], norm_num_groups)
        self.conv_out = nn.Conv2d(widths[0], out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up[1:]):
            h = level.upsample(level(h))
        h = self.up[0](h)
        if self.give_pre_end:
            return h
        h = self.conv_out(F.silu(self.norm_out(h)))
        return torch.tanh(h) if self.tanh_out else h
