# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable convolution (Dai et al., ICCV 2017, section 2.1) and modulated DCNv2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._common import (
    check_channels,
    check_dims,
    check_pairs,
    check_same_device,
    emits_onnx_nodes,
    empty_gradient,
    empty_output,
    pair,
    register_backward,
)
from ._onnx import deform_conv_node

"""
Shape shorthand in this module:

    N: images, C: input channels, C': output channels
    H, W: input size, H', W': output size
    K: taps, kernel height * kernel width, row-major
    G: offset groups
"""


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
    """Deformable convolution: each tap is displaced by a learned offset (Eq. 2).

    A drop-in replacement for `torchvision.ops.deform_conv2d`. Pixels outside the map count as
    zero (Eq. 3-4). With zero offsets it equals `torch.nn.functional.conv2d`.

    Args:
        input: Tensor[N, C, H, W], contiguous or channels-last; the output has its format.
        offset: Tensor[N, 2*G*K, H', W'], (dy, dx) for each offset group and tap, in pixels of
            the input. Offset group g applies to the g-th block of C/G input channels. Any
            floating dtype.
        weight: Tensor[C', C/groups, kernel height, kernel width]; the number of convolution
            groups follows from its shape.
        bias: Tensor[C'].
        stride: (height, width) or one number for both.
        padding: zero padding, in the same form.
        dilation: in the same form.
        mask: Tensor[N, G*K, H', W'], a factor for each tap and offset group (DCNv2). Any
            floating dtype.

    Returns:
        Tensor[N, C', H', W'].

    Raises:
        ValueError: if a shape, size or device is not valid.
        TypeError: if a dtype is not valid.

    The gradient of the offset is the derivative of the bilinear kernel, at integer positions the
    right-hand one; it is zero for taps at or beyond -1 and at or beyond H (W). NaN in offset or
    mask makes that output position NaN, but does not propagate to the gradient of `input`. All
    gradients are deterministic, except that of `input` on CUDA without
    `torch.use_deterministic_algorithms(True)`. Double backward is not supported.

    Example:
        >>> x, weight = torch.rand(1, 16, 32, 32), torch.rand(8, 16, 3, 3)
        >>> offset = torch.zeros(1, 2 * 3 * 3, 32, 32)
        >>> deform_conv2d(x, offset, weight, padding=1).shape
        torch.Size([1, 8, 32, 32])
    """
    geometry = pair(stride), pair(padding), pair(dilation)
    if emits_onnx_nodes():
        shape = [input.shape[0], weight.shape[0], *_output_size(input, weight, *geometry)]
        return deform_conv_node(input, offset, weight, bias, *geometry, mask, shape)
    return torch.ops.dcn_plugin.deform_conv2d(input, offset, weight, bias, *geometry, mask)


def _output_size(
    input: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> list[int]:
    """Returns (H', W'), from the input, not the offset, whose sizes may be other symbols."""
    return [
        (input.shape[2 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1)
        // stride[i]
        + 1
        for i in range(2)
    ]


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
    op = "deform_conv2d"
    check_dims(op, 4, input=input, offset=offset, weight=weight)
    if mask is not None:
        check_dims(op, 4, mask=mask)
    if bias is not None:
        check_dims(op, 1, bias=bias)
    check_same_device(op, input, offset=offset, weight=weight, bias=bias, mask=mask)
    check_pairs(op, 1, stride=stride, dilation=dilation, kernel_size=weight.shape[2:])
    check_pairs(op, 0, padding=padding)
    check_channels(input, offset, weight, mask)
    size = _output_size(input, weight, stride, padding, dilation)
    check_pairs(op, 1, output_size=size)
    return empty_output(input, input.shape[0], weight.shape[0], *size)


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
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    others = {"grad_output": grad_output, "offset": offset, "weight": weight, "mask": mask}
    check_same_device("deform_conv2d", input, **others)
    return (
        empty_gradient(input, output_mask[0], input),
        empty_gradient(offset, output_mask[1], offset),
        empty_gradient(weight, output_mask[2], weight),
        weight.new_empty(weight.shape[0] if output_mask[3] else 0),
        empty_gradient(mask, output_mask[4], offset),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, offset, weight, _, *ctx.geometry, mask = inputs
    ctx.save_for_backward(input, offset, weight, mask)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, offset, weight, mask = ctx.saved_tensors
    output_mask = [*ctx.needs_input_grad[:4], ctx.needs_input_grad[7]]
    computed = torch.ops.dcn_plugin._deform_conv2d_backward(
        grad_output, input, offset, weight, *ctx.geometry, mask, output_mask
    )
    *grads, grad_mask = (
        grad if needed else None for grad, needed in zip(computed, output_mask, strict=True)
    )
    return (*grads, None, None, None, grad_mask)  # none for stride, padding and dilation


register_backward("deform_conv2d", _backward, _setup_context)
