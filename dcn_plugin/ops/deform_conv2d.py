# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable convolution (Dai et al., ICCV 2017, section 2.1), and its modulated form (DCNv2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._common import (
    check_same_device,
    empty_gradient,
    memory_format_of,
    pair,
    refuse_double_backward,
)

"""
Shape shorthand in this module:

    N: images, C: input channels, C': output channels
    H, W: input size, H', W': output size
    K: taps, kernel height * kernel width, row-major
    G: offset groups
"""

_WANTED = (0, 1, 2, 3, 7)  # places of input, offset, weight, bias and mask in the schema


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = (1, 1),
    padding: int | Sequence[int] = (0, 0),
    dilation: int | Sequence[int] = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Convolves with taps that are displaced by learnt offsets (Eq. 2).

    A drop-in for `torchvision.ops.deform_conv2d`. Pixels outside the map count as zero
    (Eq. 3-4). Offsets with zeros everywhere give `torch.nn.functional.conv2d`.

    Args:
        input: Tensor[N, C, H, W], contiguous or channels-last; the output has its format.
        offset: Tensor[N, 2*G*K, H', W'] in pixels of the input: for each offset group and tap
            (dy, dx). Offset group g displaces the g-th block of C/G input channels. Of any
            floating dtype.
        weight: Tensor[C', C/groups, kernel height, kernel width]; the number of convolution
            groups follows from its shape.
        bias: Tensor[C'].
        stride: of the output positions, (height, width) or one number for both.
        padding: of the input with zeros, likewise.
        dilation: distance of the taps, likewise.
        mask: Tensor[N, G*K, H', W'], a factor per tap and offset group (DCNv2). Of any floating
            dtype.

    Returns:
        Tensor[N, C', H', W'].

    Raises:
        ValueError: if a shape, size or device does not fit; the message names it.
        TypeError: if a dtype does not fit.

    The gradient of an offset is that of the bilinear kernel, at integer positions the one from
    the right; it is zero for taps at or beyond -1 and at or beyond H (W). NaN in an offset or in
    the mask makes that output position NaN and reaches no pixel's gradient. All gradients have
    the same bits in every run, except that of `input` on CUDA unless PyTorch's deterministic
    algorithms are on. There is no double backward.

    Example:
        >>> x, weight = torch.rand(1, 16, 32, 32), torch.rand(8, 16, 3, 3)
        >>> offset = torch.zeros(1, 2 * 3 * 3, 32, 32)
        >>> deform_conv2d(x, offset, weight, padding=1).shape
        torch.Size([1, 8, 32, 32])
    """
    return torch.ops.dcn_plugin.deform_conv2d(
        input, offset, weight, bias, pair(stride), pair(padding), pair(dilation), mask
    )


@torch.library.register_fake("dcn_plugin::deform_conv2d")
def _fake(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: Tensor | None,
) -> Tensor:
    check_same_device("deform_conv2d", input, offset=offset, weight=weight, bias=bias, mask=mask)
    # From the input, not from the offset: sizes stay functions of what the user sees as dynamic.
    size = [
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1)
        // stride[i]
        + 1
        for i in range(2)
    ]
    return torch.empty(
        (input.shape[0], weight.shape[0], *size),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format_of(input),
    )


@torch.library.register_fake("dcn_plugin::_deform_conv2d_backward")
def _fake_backward(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_gradient(input, wanted[0], input),
        empty_gradient(offset, wanted[1], offset),
        empty_gradient(weight, wanted[2], weight),
        weight.new_empty(weight.shape[0] if wanted[3] else 0),
        empty_gradient(mask, wanted[4], offset),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, offset, weight, _, *ctx.geometry, mask = inputs
    ctx.save_for_backward(input, offset, weight, mask)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[place] for place in _WANTED]
    found = torch.ops.dcn_plugin._deform_conv2d_backward(
        grad_output, input, offset, weight, *ctx.geometry, mask, wanted
    )
    gradients: list[Tensor | None] = [None] * 8
    for place, is_wanted, gradient in zip(_WANTED, wanted, found, strict=True):
        if is_wanted:
            gradients[place] = gradient
    return tuple(gradients)


torch.library.register_autograd(
    "dcn_plugin::deform_conv2d", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    "dcn_plugin::_deform_conv2d_backward", refuse_double_backward("deform_conv2d")
)
