# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Residual blocks with a deformable 3x3 convolution.

The convolution keeps its name, weight and norm, and its offset branch is a sibling. These are the
names of Detectron2's `DeformBottleneckBlock`, so its weights load here.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from dcn_plugin.layers import OffsetConv2d
from dcn_plugin.ops import deform_conv2d


class DeformableBlock:
    """Mixin that makes a residual block deformable; it precedes the plain block in the bases."""

    # Names of the convolutions that are deformable.
    DEFORMABLE: tuple[str, ...] = ("conv2",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
        **plain: Any,
    ) -> None:
        """Makes the plain block and its offset branches.

        Args:
            in_channels: input channels of the block.
            out_channels: output channels of the block.
            offset_groups: number of offset groups.
            modulated: whether the deformable convolutions have a mask (DCNv2).
            plain: the other arguments of the plain block.
        """
        super().__init__(in_channels, out_channels, **plain)
        for name in self.DEFORMABLE:
            branch = OffsetConv2d(getattr(self, name), offset_groups, modulated)
            setattr(self, f"{name}_offset", branch)

    def apply_conv(self, name: str, x: Tensor) -> Tensor:
        """Applies a convolution at the offsets that its branch predicts, then its norm.

        Args:
            name: name of the convolution, a Detectron2 `Conv2d` without activation.
            x: Tensor[N, C, H, W].

        Returns:
            Tensor[N, C', H', W'].
        """
        conv: Conv2d = getattr(self, name)
        offset, mask = getattr(self, f"{name}_offset")(x)
        out = deform_conv2d(
            x, offset, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, mask
        )
        return out if conv.norm is None else conv.norm(out)


class DeformBottleneckBlock(DeformableBlock, BottleneckBlock):
    """A bottleneck block whose 3x3 convolution is deformable."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block.

        Args:
            x: Tensor[N, in_channels, H, W].

        Returns:
            Tensor[N, out_channels, H', W'].
        """
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.apply_conv("conv2", out))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class DilatedBasicBlock(BasicBlock):
    """Detectron2's `BasicBlock` (ResNet-18 and 34) with dilation."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dilation: int = 1, **plain: Any
    ) -> None:
        """Makes the block.

        Args:
            in_channels: input channels of the block.
            out_channels: output channels of the block.
            dilation: dilation of both 3x3 convolutions.
            plain: the other arguments of `BasicBlock`.
        """
        super().__init__(in_channels, out_channels, **plain)
        for conv in (self.conv1, self.conv2):
            conv.dilation = conv.padding = (dilation, dilation)


class DeformBasicBlock(DeformableBlock, DilatedBasicBlock):
    """A basic block whose second convolution is deformable."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block.

        Args:
            x: Tensor[N, in_channels, H, W].

        Returns:
            Tensor[N, out_channels, H', W'].
        """
        out = F.relu_(self.conv1(x))
        out = self.apply_conv("conv2", out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)
