# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Blocks of Aligned-Inception-ResNet (figure 8)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from fvcore.nn.weight_init import c2_msra_fill

from .deform_block import DeformableBlock


class Activation(CNNBlockBase):
    """Norm and ReLU of a residual sum, at the beginning of a block or the end of a stage."""

    def __init__(self, channels: int, norm: str) -> None:
        """Makes the norm.

        Args:
            channels: number of channels.
            norm: Detectron2's name of the normalization.
        """
        super().__init__(channels, channels, 1)
        self.norm = get_norm(norm, channels) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Applies the norm and ReLU.

        Args:
            x: Tensor[N, channels, H, W].

        Returns:
            Tensor[N, channels, H, W].
        """
        return F.relu(self.norm(x))


class InceptionResidualBlock(CNNBlockBase):
    """Residual block with two branches, concatenated and joined by a 1x1 convolution.

    With c output channels, the deep branch is 1x1, 3x3, 3x3 of c/8 channels and the wide branch
    1x1, 3x3 of c/4. The block is pre-activated: norm and ReLU come before each convolution, and
    the output is the sum without activation. The first block of a stage has no norm for its input,
    which the stem or the previous stage has already activated.
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
            in_channels: input channels of the block.
            out_channels: c, a multiple of 8.
            stride: stride of the block.
            dilation: dilation of the 3x3 convolutions.
            stride_in_1x1: whether the first convolution of a branch has the stride, else the
                second.
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
            Tensor[N, out_channels, H', W'], without activation.
        """
        active = self.activation(x) if self.shortcut is None else x
        deep = self.apply_conv("deep3", F.relu_(self.deep2(F.relu_(self.deep1(active)))))
        wide = self.apply_conv("wide2", F.relu_(self.wide1(active)))
        # The branches end with their norms, so this is norm and ReLU before `join`.
        out = self.join(F.relu_(torch.cat([deep, wide], dim=1)))
        return out + (x if self.shortcut is None else self.shortcut(active))

    def apply_conv(self, name: str, x: Tensor) -> Tensor:
        """Applies a convolution and its norm; `DeformableBlock` overrides it."""
        return getattr(self, name)(x)


class DeformInceptionResidualBlock(DeformableBlock, InceptionResidualBlock):
    """The block with a deformable convolution as the last 3x3 of each branch.

    The paper does not say which convolutions of the block are deformable.
    """

    DEFORMABLE = ("deep3", "wide2")


def _conv(in_channels: int, out_channels: int, kernel: int, norm: str = "", **more: Any) -> Conv2d:
    """Makes a convolution without bias, initialized by `c2_msra_fill`, and its norm."""
    after: nn.Module | None = get_norm(norm, out_channels)
    conv = Conv2d(in_channels, out_channels, kernel, bias=False, norm=after, **more)
    c2_msra_fill(conv)
    return conv
