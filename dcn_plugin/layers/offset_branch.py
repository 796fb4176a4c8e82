# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What predicts where deformable layers sample."""

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
    K: taps of the convolution served, G: offset groups
"""


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Returns a context in which ops on a tensor's device keep their inputs' dtypes."""
    if tensor.device.type == "meta":  # which knows no autocast
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
    """Convolves in the dtype of the weight, whatever autocast says.

    Args:
        input: Tensor[N, C, H, W].
        weight: Tensor[C', C, kh, kw].
        bias: Tensor[C'].
        stride: as in `torch.nn.functional.conv2d`, like the rest.
        padding: likewise.
        dilation: likewise.

    Returns:
        Tensor[N, C', H', W'].
    """
    with without_autocast(input):
        return F.conv2d(input.to(weight.dtype), weight, bias, stride, padding, dilation)


def resting_taps(conv: Any, axis: int, cells: int, like: Tensor) -> Tensor:
    """Returns where the taps of a convolution lie along an axis before they are moved.

    Args:
        conv: whose kernel_size, stride, padding and dilation are pairs.
        axis: 0 for rows, 1 for columns.
        cells: of the output along it.
        like: a tensor of the device and dtype to use.

    Returns:
        Tensor[cells, taps along the axis], in cells of the input.
    """
    taps = torch.arange(conv.kernel_size[axis], device=like.device) * conv.dilation[axis]
    out = torch.arange(cells, device=like.device) * conv.stride[axis]
    return (out[:, None] + taps - conv.padding[axis]).to(like.dtype)


class OffsetBranch:
    """What every predictor of offsets is, beside a layer with weight and bias.

    It starts at zero (section 2.3): training begins with an undeformed grid.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def reset_parameters(self) -> None:
        """Sets weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class OffsetLinear(OffsetBranch, nn.Linear):
    """Predicts the offsets of a RoI's bins from what was pooled of it."""


class OffsetMaps(OffsetBranch, nn.Conv2d):
    """Predicts maps of which the offsets of a RoI's bins are pooled."""


class OffsetConv2d(OffsetBranch, nn.Conv2d):
    """Predicts the offsets, and the mask if modulated, of the convolution that it serves.

    It has the kernel, stride, padding and dilation of that convolution, and a bias.
    """

    def __init__(self, served: nn.Conv2d, offset_groups: int = 1, modulated: bool = False) -> None:
        """Makes the branch of one convolution.

        Args:
            served: the convolution whose taps are displaced; only its shape is read.
            offset_groups: G, how many blocks of input channels have offsets of their own.
            modulated: whether there is a mask too (DCNv2).

        Raises:
            ValueError: if the offset groups do not divide the input channels.
        """
        channels = served.in_channels
        if offset_groups < 1 or channels % offset_groups != 0:
            raise ValueError(
                f"offset_groups must be a divisor of the {channels} input channels, "
                f"got {offset_groups}"
            )
        taps = served.kernel_size[0] * served.kernel_size[1]
        super().__init__(
            channels,
            (3 if modulated else 2) * offset_groups * taps,
            served.kernel_size,
            served.stride,
            served.padding,
            served.dilation,
            device=served.weight.device,
            dtype=served.weight.dtype,
        )
        self.offset_groups = offset_groups
        self.modulated = modulated

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """Predicts where to sample.

        Args:
            input: Tensor[N, C, H, W], what the convolution served reads.

        Returns:
            offset Tensor[N, 2*G*K, H', W'], (dy, dx) per tap, and mask Tensor[N, G*K, H', W'] in
            (0, 1), None unless modulated. Under autocast both are computed in the dtype of the
            weights: bfloat16 resolves 1/16 pixel at 8 pixels.
        """
        prediction = convolve_exactly(
            input, self.weight, self.bias, self.stride, self.padding, self.dilation
        )
        if not self.modulated:
            return prediction, None
        # As in Detectron2 and DCNv2: first all offsets, then all masks.
        offset, mask = prediction.tensor_split([prediction.shape[1] // 3 * 2], dim=1)
        return offset, mask.sigmoid()

    def extra_repr(self) -> str:
        """Describes the branch in the module's repr."""
        modulated = ", modulated=True" if self.modulated else ""
        return f"{super().extra_repr()}, offset_groups={self.offset_groups}{modulated}"
