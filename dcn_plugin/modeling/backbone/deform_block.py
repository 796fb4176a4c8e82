# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Residual blocks whose 3x3 convolution is deformable."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from detectron2.modeling.backbone.resnet import BottleneckBlock

from dcn_plugin.layers import OffsetConv2d
from dcn_plugin.ops import deform_conv2d


class DeformBottleneckBlock(BottleneckBlock):
    """A bottleneck block whose 3x3 convolution is deformable.

    `conv2` keeps its name, weight and norm, with `conv2_offset` beside it: the names of
    Detectron2's own deformable block, so that weights of either load here.
    """

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
        out = F.relu_(self.deform(out))
        out = self.conv3(out)
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)

    def deform(self, x: Tensor) -> Tensor:
        """Applies `conv2` and its norm where `conv2_offset` says."""
        conv = self.conv2
        offset, mask = self.conv2_offset(x)
        out = deform_conv2d(
            x, offset, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, mask
        )
        return out if conv.norm is None else conv.norm(out)
