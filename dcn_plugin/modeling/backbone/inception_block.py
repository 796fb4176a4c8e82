# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The block of Aligned-Inception-ResNet, plain or deformable (figure 8)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from fvcore.nn.weight_init import c2_msra_fill

from .deform_block import DeformableBlock


class Activation(CNNBlockBase):
    """Norm and ReLU of a bare sum: at the beginning of a block, and at the end of a stage."""

    def __init__(self, channels: int, norm: str) -> None:
        """Makes the norm.

        Args:
            channels: of the sum.
            norm: Detectron2's name of the normalization.
        """
        super().__init__(channels, channels, 1)
        self.norm = get_norm(norm, channels) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Applies both.

        Args:
            x: Tensor[N, channels, H, W].

        Returns:
            Tensor[N, channels, H, W].
        """
        return F.relu(self.norm(x))


class InceptionResidualBlock(CNNBlockBase):
    """Two branches of convolutions, joined by a 1x1 convolution and added to the input.

    With c output channels, the deep branch is 1x1, 3x3, 3x3 of c/8 channels, the wide one 1x1,
    3x3 of c/4. The block is pre-activated: norm and ReLU come before each convolution, and what
    leaves it is the bare sum. A block that changes the size, the first of its stage, has no norm
    of its own for its input: what comes from the stem or the stage before is activated already.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        stride_in_1x1: bool = True,
        norm: str = "BN",
    ) -> None:
        """Makes the block.

        Args:
            in_channels: of the block.
            out_channels: c, a multiple of 8.
            stride: of the block.
            dilation: of the 3x3 convolutions.
            stride_in_1x1: whether the first convolution of a branch has the stride, or the second.
            norm: Detectron2's name of the normalization.
        """
        super().__init__(in_channels, out_channels, stride)
        deep, wide = out_channels // 8, out_channels // 4
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        dilated: dict[str, Any] = {"padding": dilation, "dilation": dilation}
        self.deep1 = _conv(in_channels, deep, 1, norm, stride=first)
        self.deep2 = _conv(deep, deep, 3, norm, stride=second, **dilated)
        self.deep3 = _conv(deep, deep, 3, norm, **dilated)
        self.wide1 = _conv(in_channels, wide, 1, norm, stride=first)
        self.wide2 = _conv(wide, wide, 3, norm, stride=second, **dilated)
        self.join = _conv(deep + wide, out_channels, 1)
        if in_channels != out_channels or stride != 1:
            self.shortcut = _conv(in_channels, out_channels, 1, stride=stride)
        else:
            self.activation = Activation(in_channels, norm)
            self.shortcut = None

    def forward(self, x: Tensor) -> Tensor:
        """Applies the block.

        Args:
            x: Tensor[N, in_channels, H, W].

        Returns:
            Tensor[N, out_channels, H', W'], a bare sum.
        """
        active = self.activation(x) if self.shortcut is None else x
        deep = self.last_deep(F.relu_(self.deep2(F.relu_(self.deep1(active)))))
        wide = self.last_wide(F.relu_(self.wide1(active)))
        # Each channel has its norm already: this is norm and ReLU before the joining convolution.
        out = self.join(F.relu_(torch.cat([deep, wide], dim=1)))
        return out + (x if self.shortcut is None else self.shortcut(active))

    def last_deep(self, x: Tensor) -> Tensor:
        """Applies the last convolution of the deep branch, with its norm."""
        return self.deep3(x)

    def last_wide(self, x: Tensor) -> Tensor:
        """Applies the last convolution of the wide branch, with its norm."""
        return self.wide2(x)


class DeformInceptionResidualBlock(DeformableBlock, InceptionResidualBlock):
    """The block with the last 3x3 convolution of each branch deformable.

    Which of its convolutions are the deformable ones the paper does not say.
    """

    DEFORMABLE = ("deep3", "wide2")

    def last_deep(self, x: Tensor) -> Tensor:
        """Applies the last convolution of the deep branch where its offsets say."""
        return self.deform("deep3", x)

    def last_wide(self, x: Tensor) -> Tensor:
        """Applies the last convolution of the wide branch where its offsets say."""
        return self.deform("wide2", x)


def _conv(in_channels: int, out_channels: int, kernel: int, norm: str = "", **more: Any) -> Conv2d:
    """Makes a convolution without bias, with He's initial weights, and its norm if named."""
    after: nn.Module | None = get_norm(norm, out_channels)
    conv = Conv2d(in_channels, out_channels, kernel, bias=False, norm=after, **more)
    c2_msra_fill(conv)
    return conv
