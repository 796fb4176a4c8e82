# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Blocks of public models that call torchvision's deformable convolution, in three ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import deform_conv2d  # bound here before anything is replaced


class DeformableBranch(nn.Module):
    """A convolution with an offset branch and a mask branch, whose masks are in (0, 2)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        taps = kernel_size**2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.offset = nn.Conv2d(in_channels, 2 * taps, kernel_size, padding=padding)
        self.mask = nn.Conv2d(in_channels, taps, kernel_size, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return deform_conv2d(
            x,
            offset=self.offset(x),
            weight=self.conv.weight,
            padding=self.conv.padding,
            mask=2 * self.mask(x).sigmoid(),
        ).relu()


class DeformableASPP(nn.Module):
    """Branches with kernels of 1, 3 and 7 and image pooling, as in BiRefNet's decoder."""

    calls = 3

    def __init__(self, channels: int = 6, width: int = 8) -> None:
        super().__init__()
        self.branches = nn.ModuleList(DeformableBranch(channels, width, k) for k in (1, 3, 7))
        self.pooled = nn.Conv2d(channels, width, 1)
        self.project = nn.Conv2d(4 * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.adaptive_avg_pool2d(x, 1)).expand(-1, -1, *x.shape[2:])
        return self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))


class AlignedConv(nn.Module):
    """DCNv2 whose offsets come from other features, with 8 offset groups."""

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.prediction = nn.Conv2d(channels, 27 * groups, 3, padding=1)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        y, x_, mask = self.prediction(features).chunk(3, dim=1)
        weight, bias, ones = self.conv.weight, self.conv.bias, (1, 1)
        offset = torch.cat((y, x_), dim=1)
        # Through the module, with positional arguments.
        return torchvision.ops.deform_conv2d(
            x, offset, weight, bias, ones, ones, ones, mask.sigmoid()
        )


class PyramidAlignment(nn.Module):
    """Aligns one frame to another over three levels, as in EDVR: 8 channels per offset group."""

    calls = 3

    def __init__(self, channels: int = 16, levels: int = 3) -> None:
        super().__init__()
        self.compare = nn.ModuleList(
            nn.Conv2d((2 if i == 0 else 3) * channels, channels, 3, padding=1)
            for i in range(levels)
        )
        self.align = nn.ModuleList(AlignedConv(channels) for _ in range(levels))
        self.fuse = nn.ModuleList(
            nn.Conv2d(2 * channels, channels, 3, padding=1) for _ in range(levels - 1)
        )

    def forward(self, frames: Tensor) -> Tensor:
        frame, reference = frames.chunk(2, dim=1)
        motion, aligned = None, None
        for level in range(len(self.align)):  # the smallest first
            scale = 2 ** (len(self.align) - 1 - level)
            here, there = F.avg_pool2d(frame, scale), F.avg_pool2d(reference, scale)
            features = [here, there]
            if motion is not None:
                features.append(2 * F.interpolate(motion, scale_factor=2.0, mode="bilinear"))
            motion = F.leaky_relu(self.compare[level](torch.cat(features, dim=1)), 0.1)
            result = self.align[level](here, motion)
            if aligned is not None:
                upsampled = F.interpolate(aligned, scale_factor=2.0, mode="bilinear")
                result = self.fuse[level - 1](torch.cat([result, upsampled], dim=1))
            aligned = result
        return aligned


class DeformableBottleneck(nn.Module):
    """A ResNet bottleneck with DCNv2, as in YOLACT++, through the layer of torchvision."""

    calls = 1

    def __init__(self, channels: int = 8, width: int = 4, stride: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.conv2 = torchvision.ops.DeformConv2d(width, width, 3, stride, padding=1)
        self.prediction = nn.Conv2d(width, 27, 3, stride, padding=1)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x).relu()
        offset, mask = self.prediction(y).split([18, 9], dim=1)
        y = self.conv2(y, offset, mask.sigmoid()).relu()
        return (self.conv3(y) + self.shortcut(x)).relu()


# The block, and the size of its input.
BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BiRefNet": (DeformableASPP, (2, 6, 9, 8)),
    "EDVR": (PyramidAlignment, (1, 32, 12, 8)),
    "YOLACT++": (DeformableBottleneck, (2, 8, 9, 7)),
}
