"""Layers with a low-rank branch, and the search for layers that get one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.interchange.layers import CHILDREN, SECTIONS, TEXT_LAYERS

DEFAULT_TARGET_REPLACE = UNET_DEFAULT_TARGET_REPLACE = {"Attention", "CrossAttention", "GEGLU"}
UNET_EXTENDED_TARGET_REPLACE = {"Attention", "CrossAttention", "GEGLU", "ResnetBlock2D"}
TEXT_ENCODER_DEFAULT_TARGET_REPLACE = {"CLIPAttention"}
TEXT_ENCODER_EXTENDED_TARGET_REPLACE = {"CLIPMLP", "CLIPAttention"}
ANYWHERE = UNET_EXTENDED_TARGET_REPLACE | TEXT_ENCODER_EXTENDED_TARGET_REPLACE


class LoraInjected(nn.Module):
    """A layer and `scale * up(selector(down(x)))` beside it (arXiv 2106.09685, section 4).

    `plain` names the attribute that holds the layer, so that state-dict names are those of the published classes. `up`
    starts at zero, `down` at N(0, 1 / r^2). Raises `ValueError` for a rank above the width of the layer.
    """

    plain: str
    ones: tuple[int, ...] = ()  # the dimensions after [out, in] of a weight with window 1

    def _attach(self, layer: nn.Module, r: int, dropout_p: float, scale: float) -> None:
        weight = layer.weight
        if not 1 <= r <= min(weight.shape[:2]):
            raise ValueError(f"LoRA rank {r} must be from 1 to {min(weight.shape[:2])}, the width of the layer")
        setattr(self, self.plain, layer)
        self.r, self.scale, self.dropout, self.selector = r, scale, nn.Dropout(dropout_p), nn.Identity()
        self.lora_down, self.lora_up = self._factors(layer, r)
        for factor in (self.lora_down, self.lora_up):
            factor.to(device=weight.device, dtype=weight.dtype)
        nn.init.normal_(self.lora_down.weight, std=1 / r)
        nn.init.zeros_(self.lora_up.weight)
        self.train(layer.training)

    @classmethod
    def around(cls, layer: nn.Module, r: int, dropout_p: float = 0.0, scale: float = 1.0) -> LoraInjected:
        """The branch beside an existing layer, whose parameters are kept."""
        one = cls.__new__(cls)
        nn.Module.__init__(one)
        one._attach(layer, r, dropout_p, scale)
        return one

    @property
    def layer(self) -> nn.Module:
        """The layer itself."""
        return getattr(self, self.plain)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.dropout(self.lora_up(self.selector(self.lora_down(x)))) * self.scale

    def selected_up(self) -> Tensor:
        """The weight of `up` multiplied by the selector's diagonal, without the scale."""
        up = self.lora_up.weight
        if isinstance(self.selector, nn.Identity):
            return up
        diag = self.selector.weight.flatten(1).diagonal()
        return up * diag.view(1, -1, *self.ones)

    def realize_as_lora(self) -> tuple[Tensor, Tensor]:
        """The factors (up, down) of the change, the scale inside `up`."""
        return self.selected_up().detach() * self.scale, self.lora_down.weight.detach()

    def set_selector_from_diag(self, diag: Tensor) -> None:
        """Weight the r components of the change by `diag` [r]. Raises `ValueError` for another shape."""
        if diag.shape != (self.r,):
            raise ValueError(f"expected a diagonal of {self.r} values, one for each rank, got shape {list(diag.shape)}")
        kind = nn.Linear if not self.ones else nn.Conv2d
        self.selector = kind(self.r, self.r, *self.ones[:1], bias=False).to(self.lora_up.weight)
        self.selector.weight = nn.Parameter(
            torch.diag(diag).to(self.lora_up.weight).view(self.r, self.r, *self.ones), requires_grad=False
        )

    def set_factors(self, up: Tensor, down: Tensor) -> None:
        """Take over factors, of any rank, in the layer's dtype and on its device."""
        self.r, self.selector = len(down), nn.Identity()
        for factor, value in ((self.lora_up, up), (self.lora_down, down)):
            factor.weight = nn.Parameter(value.detach().to(self.weight).clone(), factor.weight.requires_grad)


class LoraInjectedLinear(LoraInjected):
    """A linear layer with a branch: x [..., in] -> [..., out]."""

    plain = "linear"

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, r: int = 4, dropout_p: float = 0.1,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self._attach(nn.Linear(in_features, out_features, bias), r, dropout_p, scale)

    def _factors(self, layer: nn.Linear, r: int) -> tuple[nn.Module, nn.Module]:
        return nn.Linear(layer.in_features, r, bias=False), nn.Linear(r, layer.out_features, bias=False)


class LoraInjectedConv2d(LoraInjected):
    """A convolution with a branch: `down` has its window, stride, padding and dilation, `up` is 1 x 1.

    x [b, in, h, w] -> [b, out, h', w'].
    """

    plain, ones = "conv", (1, 1)

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int], stride: int = 1,
        padding: int = 0, dilation: int = 1, groups: int = 1, bias: bool = True, r: int = 4, dropout_p: float = 0.1,
        scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self._attach(conv, r, dropout_p, scale)

    def _factors(self, layer: nn.Conv2d, r: int) -> tuple[nn.Module, nn.Module]:
        if layer.groups != 1:
            raise ValueError(f"a convolution of {layer.groups} groups has no low-rank branch; only of one group")
        window = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return nn.Conv2d(layer.in_channels, r, *window, bias=False), nn.Conv2d(r, layer.out_channels, 1, bias=False)


INJECTED = {nn.Linear: LoraInjectedLinear, nn.Conv2d: LoraInjectedConv2d}


def targets(
    model: nn.Module, classes: Collection[str] | None = None, kinds: Sequence[type] = tuple(INJECTED)
) -> dict[str, nn.Module]:
    """Linear and convolution layers, plain or with a branch, inside modules of the named classes (None: anywhere).

    Each one appears once, by name, in the order of published files (`numbered`).
    """
    found: dict[str, nn.Module] = {}
    known = (*kinds, *(INJECTED[kind] for kind in kinds))
    for prefix, module in model.named_modules():
        if classes is None or type(module).__name__ in classes:
            inside = ""
            for name, layer in module.named_modules(prefix=prefix):
                if inside and name.startswith(inside):
                    continue
                inside = f"{name}." if isinstance(layer, LoraInjected) else ""
                if isinstance(layer, known) and (name != prefix or classes is None):
                    found.setdefault(name, layer)
    return numbered(found)


def numbered(found: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Sort layers in the order of published files, i.e. of the versions of diffusers and transformers of that time.

    There the feed-forward came before the cross-attention. The order of other models does not change.
    """
    for known, key in ((_is_unet, _unet_key), (_is_text, _text_key)):
        if found and all(map(known, found)):
            return {name: found[name] for name in sorted(found, key=key)}
    return found


def known_order(model: nn.Module, classes: Collection[str]) -> str | None:
    """`diffusers` if the layers of a UNet are in the order of published files, else None."""
    found = targets(model, classes)
    return "diffusers" if found and all(map(_is_unet, found)) else None


def _is_unet(name: str) -> bool:
    return name.partition(".")[0] in SECTIONS


def _is_text(name: str) -> bool:
    return ".layers." in f".{name}" and name.rpartition(".")[2] in TEXT_LAYERS


def _unet_key(name: str) -> tuple:
    section, *rest = name.split(".")
    level = int(rest.pop(0)) if rest and rest[0].isdigit() else 0
    child = CHILDREN.index(rest[0]) if rest and rest[0] in CHILDREN else 0
    number = int(rest[1]) if len(rest) > 1 and rest[1].isdigit() else 0
    inner = name.partition("transformer_blocks.")[2].split(".")
    block = (int(inner[0]), ("attn1", "ff", "attn2").index(inner[1])) if len(inner) > 1 else (-1, 0)
    return SECTIONS.index(section), level, child, number, *block


def _text_key(name: str) -> tuple:
    return int(f".{name}".partition(".layers.")[2].split(".")[0]), TEXT_LAYERS.index(name.rpartition(".")[2])


def injected(model: nn.Module, classes: Collection[str] | None = None) -> dict[str, LoraInjected]:
    """The layers with a branch, by name, in the order of published files."""
    return {name: one for name, one in targets(model, classes).items() if isinstance(one, LoraInjected)}


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace a layer by another."""
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    owner._modules[child] = layer


def pairs_of(loras: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """The (up, down) of a list [up, down, up, down, ...]. Raises `InputError` for one of odd length."""
    if len(loras) % 2:
        raise InputError(f"expected a list of up and down tensors by turns, got {len(loras)} tensors")
    return zip(loras[::2], loras[1::2], strict=True)
