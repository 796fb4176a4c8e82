# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The equations of the paper in float64, with loops: slow, but easy to verify."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Pair = tuple[int, int]


def g(size: int, p: Tensor) -> Tensor:
    """Returns the kernel of Eq. 4, max(0, 1 - |q - p|), for all q of an axis."""
    q = torch.arange(size, dtype=torch.float64)
    return torch.clamp(1 - (q - p).abs(), min=0)


def g_derivative(size: int, p: Tensor) -> Tensor:
    """Returns dg(q, p)/dp for all q; at integer p the right-hand derivative."""
    q = torch.arange(size, dtype=torch.float64)
    rises = ((q - 1 <= p) & (p < q)).double()
    falls = ((q <= p) & (p < q + 1)).double()
    return rises - falls


def sample(x: Tensor, p_y: Tensor, p_x: Tensor) -> Tensor:
    """Returns x(p) of Eq. 3: the sum over all pixels q of G(q, p) x(q).

    Args:
        x: Tensor[C, H, W].
        p_y: the row, a scalar.
        p_x: the column, a scalar.
    """
    big_g = g(x.shape[1], p_y)[:, None] * g(x.shape[2], p_x)[None, :]
    return (big_g * x).sum(dim=(1, 2))


def sample_gradient(x: Tensor, p_y: Tensor, p_x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dx(p)/dp_y and dx(p)/dp_x of Eq. 7, zero at or beyond -1 and H (W)."""
    _, height, width = x.shape
    if not (-1 < p_y < height and -1 < p_x < width):
        return torch.zeros_like(x[:, 0, 0]), torch.zeros_like(x[:, 0, 0])
    dg_dy = g_derivative(height, p_y)[:, None] * g(width, p_x)[None, :]
    dg_dx = g(height, p_y)[:, None] * g_derivative(width, p_x)[None, :]
    return (dg_dy * x).sum(dim=(1, 2)), (dg_dx * x).sum(dim=(1, 2))


def positions(
    offset: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> Iterator[tuple[tuple[int, int, int, int], tuple[int, int], Tensor, Tensor]]:
    """Yields (image, offset group, row, column), the tap, and p0 + pn + dpn of Eq. 2 as (y, x)."""
    taps = kernel[0] * kernel[1]
    images, channels, rows, columns = offset.shape
    for n in range(images):
        for group in range(channels // (2 * taps)):
            for y in range(rows):
                for x in range(columns):
                    for i in range(kernel[0]):
                        for j in range(kernel[1]):
                            channel = 2 * (group * taps + i * kernel[1] + j)
                            d_y, d_x = offset[n, channel, y, x], offset[n, channel + 1, y, x]
                            p_y = y * stride[0] - padding[0] + i * dilation[0] + d_y
                            p_x = x * stride[1] - padding[1] + j * dilation[1] + d_x
                            yield (n, group, y, x), (i, j), p_y, p_x


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Returns Eq. 2, differentiable, for any number of groups and offset groups."""
    kernel = (weight.shape[2], weight.shape[3])
    taps = kernel[0] * kernel[1]
    per_offset_group = input.shape[1] // (offset.shape[1] // (2 * taps))
    # A dict instead of a tensor, since autograd restricts in-place writes.
    sampled: dict[tuple[int, int, int, int], list[Tensor]] = {}
    for (n, group, y, x), (i, j), p_y, p_x in positions(offset, kernel, stride, padding, dilation):
        channels = slice(group * per_offset_group, (group + 1) * per_offset_group)
        tap = i * kernel[1] + j
        value = sample(input[n, channels], p_y, p_x)
        if mask is not None:
            value = value * mask[n, group * taps + tap, y, x]
        sampled.setdefault((n, y, x, tap), []).append(value)
    rows = []
    for n in range(input.shape[0]):
        for y in range(offset.shape[2]):
            for x in range(offset.shape[3]):
                column = torch.stack([torch.cat(sampled[n, y, x, t]) for t in range(taps)], dim=1)
                rows.append(_multiply(weight, column))
    shape = (input.shape[0], offset.shape[2], offset.shape[3], weight.shape[0])
    output = torch.stack(rows).reshape(shape) if rows else input.new_zeros(shape)
    if bias is not None:
        output = output + bias
    return output.permute(0, 3, 1, 2)


def _multiply(weight: Tensor, column: Tensor) -> Tensor:
    """Returns the sum over taps of w(pn) x(pn) for one position: (C, K) -> (C')."""
    group_in = weight.shape[1]
    groups = column.shape[0] // group_in
    group_out = weight.shape[0] // groups
    result = []
    for c in range(weight.shape[0]):
        first = c // group_out * group_in
        result.append((weight[c].flatten(1) * column[first : first + group_in]).sum())
    return torch.stack(result)


def offset_gradient(
    grad_output: Tensor,
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    mask: Tensor | None = None,
) -> Tensor:
    """Returns the gradient of the offset by Eq. 7, right-hand at integer positions."""
    kernel = (weight.shape[2], weight.shape[3])
    taps = kernel[0] * kernel[1]
    per_offset_group = input.shape[1] // (offset.shape[1] // (2 * taps))
    group_in = weight.shape[1]
    group_out = weight.shape[0] // (input.shape[1] // group_in)
    result = torch.zeros_like(offset)
    for (n, group, y, x), (i, j), p_y, p_x in positions(offset, kernel, stride, padding, dilation):
        first = group * per_offset_group
        derivatives = sample_gradient(input[n, first : first + per_offset_group], p_y, p_x)
        tap = group * taps + i * kernel[1] + j
        scale = 1.0 if mask is None else mask[n, tap, y, x]
        for c in range(first, first + per_offset_group):
            conv_group = c // group_in
            outputs = slice(conv_group * group_out, (conv_group + 1) * group_out)
            grad = (grad_output[n, outputs, y, x] * weight[outputs, c % group_in, i, j]).sum()
            result[n, 2 * tap, y, x] += scale * grad * derivatives[0][c - first]
            result[n, 2 * tap + 1, y, x] += scale * grad * derivatives[1][c - first]
    return result
