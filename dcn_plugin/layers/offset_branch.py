# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Branches that predict the offsets of deformable layers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

"""
Shape shorthand in this module:

    N: images, C: input channels, H, W: input size, H', W': output size
    K: taps of the deformable convolution, G: offset groups
"""


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Returns a context in which autocast is disabled on the device of a tensor."""
    if tensor.device.type == "meta":  # autocast does not support meta
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


@torch.fx.wrap
def convolve_exactly(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Like `torch.nn.functional.conv2d`, in the dtype of the weight even under autocast.

    Args:
        input: Tensor[N, C, H, W].
        weight: Tensor[C', C, kh, kw].
        bias: Tensor[C'].
        stride: as in `torch.nn.functional.conv2d`.
        padding: as in `torch.nn.functional.conv2d`.
        dilation: as in `torch.nn.functional.conv2d`.

    Returns:
        Tensor[N, C', H', W'].
    """
    with without_autocast(input):
        return F.conv2d(input.to(weight.dtype), weight, bias, stride, padding, dilation)


def resting_taps(conv: Any, axis: int, cells: int, like: Tensor) -> Tensor:
    """Returns the sampling locations of a convolution along one axis, without offsets.

    Args:
        conv: a module with kernel_size, stride, padding and dilation as pairs.
        axis: 0 for rows, 1 for columns.
        cells: output size along the axis.
        like: a tensor with the device and dtype of the result.

    Returns:
        Tensor[cells, taps along the axis], in pixels of the input.
    """
    taps = torch.arange(conv.kernel_size[axis], device=like.device) * conv.dilation[axis]
    out = torch.arange(cells, device=like.device) * conv.stride[axis]
    return (out[:, None] + taps - conv.padding[axis]).to(like.dtype)


class OffsetBranch:
    """Mixin of all layers that predict offsets.

    Weight and bias are initialized with zeros (section 2.3): training starts without offsets.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def reset_parameters(self) -> None:
        """Sets weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class OffsetLinear(OffsetBranch, nn.Linear):
    """Predicts the offsets of the bins of a RoI from its pooled features."""


class OffsetMaps(OffsetBranch, nn.Conv2d):
    """Predicts offset maps, from which the offsets of the bins of a RoI are pooled."""


class OffsetConv2d(OffsetBranch, nn.Conv2d):
    """Predicts the offsets, and the mask if modulated, of a deformable convolution.

    It has the same kernel, stride, padding and dilation, and a bias.
    """

    def __init__(self, conv: nn.Conv2d, offset_groups: int = 1, modulated: bool = False) -> None:
        """Creates the branch of a convolution.

        Args:
            conv: the deformable convolution; only its sizes are used.
            offset_groups: G, number of blocks of input channels with separate offsets.
            modulated: whether to predict a mask too (DCNv2).

        Raises:
            ValueError: if the offset groups do not divide the input channels.
        """
        channels = conv.in_channels
        if offset_groups < 1 or channels % offset_groups != 0:
            raise ValueError(
                f"offset_groups must be a divisor of the {channels} input channels, "
                f"got {offset_groups}"
            )
        taps = conv.kernel_size[0] * conv.kernel_size[1]
        super().__init__(
            channels,
            (3 if modulated else 2) * offset_groups * taps,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            device=conv.weight.device,
            dtype=conv.weight.dtype,
        )
        self.offset_groups = offset_groups
        self.modulated = modulated

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predicts offsets and mask.

        Args:
            input: Tensor[N, C, H, W], the input of the deformable convolution.

        Returns:
            offset Tensor[N, 2*G*K, H', W'], (dy, dx) per tap, and mask Tensor[N, G*K, H', W'] in
            (0, 1), None unless modulated. Under autocast both are computed in the dtype of the
            weights: in bfloat16 an offset of 8 pixels has a resolution of 1/16 pixel.
        """
        prediction = convolve_exactly(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation
        )
        if not self.modulated:
            return prediction, None
        # As in Detectron2 and DCNv2: all offsets, then all masks.
        offset, mask = prediction.tensor_split([prediction.shape[1] // 3 * 2], dim=1)
        return offset, mask.sigmoid()

    def extra_repr(self) -> str:
        """Adds the arguments to the repr of the module."""
        modulated = ", modulated=True" if self.modulated else ""
        return f"{super().extra_repr()}, offset_groups={self.offset_groups}{modulated}"
