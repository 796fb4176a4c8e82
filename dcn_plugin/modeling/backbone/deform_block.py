# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Residual blocks with a deformable 3x3 convolution.

The convolution keeps its name, weight and norm, with its offset branch beside it: the names of
Detectron2's own deformable block, so that weights of either load here.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from detectron2.layers import Conv2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from dcn_plugin.layers import OffsetConv2d
from dcn_plugin.ops import deform_conv2d


class DeformBottleneckBlock(BottleneckBlock):
    """A bottleneck block whose 3x3 convolution is deformable."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
        **plain: Any,
    ) -> None:
        """Makes the plain block, then its offset branch.

        Args:
            in_channels: of the block.
            out_channels: of the block.
            offset_groups: how many blocks of channels have offsets of their own.
            modulated: whether taps are weighted by a learnt mask too (DCNv2).
            plain: the other arguments of `BottleneckBlock`.
        """
        super().__init__(in_channels, out_channels, **plain)
        self.conv2_offset = OffsetConv2d(self.conv2, offset_groups, modulated)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block.

        Args:
            x: Tensor[N, in_channels, H, W].

        Returns:
            Tensor[N, out_channels, H', W'].
        """
        out = F.relu_(self.conv1(x))
        out = F.relu_(deform(self.conv2, self.conv2_offset, out))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class DilatedBasicBlock(BasicBlock):
    """The block of ResNet-18 and 34 with dilation, which Detectron2's does not have."""

    def __init__(
        self, in_channels: int, out_channels: int, *, dilation: int = 1, **plain: Any
    ) -> None:
        """Makes the plain block and dilates both of its 3x3 convolutions.

        Args:
            in_channels: of the block.
            out_channels: of the block.
            dilation: of both convolutions.
            plain: the other arguments of `BasicBlock`.
        """
        super().__init__(in_channels, out_channels, **plain)
        for conv in (self.conv1, self.conv2):
            conv.dilation = conv.padding = (dilation, dilation)


class DeformBasicBlock(DilatedBasicBlock):
    """A basic block whose second convolution is deformable."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        offset_groups: int = 1,
        modulated: bool = False,
        **plain: Any,
    ) -> None:
        """Makes the plain block, then its offset branch.

        Args:
            in_channels: of the block.
            out_channels: of the block.
            offset_groups: how many blocks of channels have offsets of their own.
            modulated: whether taps are weighted by a learnt mask too (DCNv2).
            plain: the other arguments of `DilatedBasicBlock`.
        """
        super().__init__(in_channels, out_channels, **plain)
        self.conv2_offset = OffsetConv2d(self.conv2, offset_groups, modulated)

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block.

        Args:
            x: Tensor[N, in_channels, H, W].

        Returns:
            Tensor[N, out_channels, H', W'].
        """
        out = F.relu_(self.conv1(x))
        out = deform(self.conv2, self.conv2_offset, out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


def deform(conv: Conv2d, offset_branch: OffsetConv2d, x: Tensor) -> Tensor:
    """Applies a convolution and its norm where the offset branch says.

    Args:
        conv: Detectron2's, without activation.
        offset_branch: of this convolution.
        x: Tensor[N, C, H, W].

    Returns:
        Tensor[N, C', H', W'].
    """
    offset, mask = offset_branch(x)
    out = deform_conv2d(
        x, offset, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, mask
    )
    return out if conv.norm is None else conv.norm(out)
