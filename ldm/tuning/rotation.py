"""OFT on convolutions that rotates the filters, as in the paper.

peft 0.21 rotates patches of the picture instead and sums overlapping patches, so an untrained 3 x 3 convolution already
differs from its base. peft's `merge` rotates the filters. Here the forward pass does the same.
"""

from __future__ import annotations

import torch.nn.functional as F
from peft.tuners.oft.layer import Conv2d
from torch import Tensor, nn


class RotatedConv2d(Conv2d):
    """y = conv(x, R w) + bias with the orthogonal, block-diagonal R of OFT (arXiv 2306.07280, eqs. 2 and 5)."""

    def forward(self, x: Tensor, *_args, **_kwargs) -> Tensor:
        base = self.get_base_layer()
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        weight = base.weight.flatten(1)  # (out, in * k * k)
        for name in self.active_adapters:
            if name in self.oft_R:
                weight = weight @ self.get_delta_weight(name).to(weight.dtype).T
        weight = weight.view_as(base.weight)
        return F.conv2d(x, weight, base.bias, base.stride, base.padding, base.dilation, base.groups)


def rotate_filters(layer: nn.Module) -> None:
    """Make a convolution of peft rotate its filters."""
    if type(layer) is Conv2d:
        layer.__class__ = RotatedConv2d
