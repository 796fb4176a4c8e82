# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI pooling in float64: Eq. 5, 6 and 8 (mode `bin`) and the two other modes.

For finite boxes and offsets. (i, j) is (row, column); in the paper i is the column.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.reference import g, g_derivative

Pair = tuple[int, int]


def round_half_away(value: float) -> float:
    """Rounds to the nearest integer, halves away from zero."""
    whole = math.trunc(value)
    return whole + math.copysign(abs(value - whole) >= 0.5, value)


def side_on_map(mode: str, low: float, high: float, scale: float) -> tuple[float, float]:
    """Returns the start p0 and the size w or h of a RoI on the map, along one axis."""
    if mode == "align":
        start = low * scale - 0.5
        return start, high * scale - 0.5 - start
    if mode == "bin":
        start = math.floor(low * scale + 0.5)
        return start, max(math.floor(high * scale + 0.5) - start, 1)
    start = round_half_away(low) * scale - 0.5
    return start, max((round_half_away(high) + 1) * scale - 0.5 - start, 0.1)


def positions(mode: str, start: float, size: float, j: int, bins: int, ratio: int) -> Tensor:
    """Returns the sampling locations of bin j along one axis, without offset."""
    if mode == "bin":
        # Eq. 5: floor(j w/k) <= p < ceil((j + 1) w/k), at p0 + p
        first, end = math.floor(j * size / bins), math.ceil((j + 1) * size / bins)
        return start + torch.arange(first, end, dtype=torch.float64)
    bin_size = size / bins
    if mode == "align":
        samples, within = ratio or max(math.ceil(bin_size), 0), 0.5  # centres of the sub-bins
    else:
        samples, within = ratio or 4, 0.0  # their left edges
    numbers = torch.arange(samples, dtype=torch.float64)
    return start + j * bin_size + (numbers + within) * bin_size / samples


class Samples(NamedTuple):
    """The samples of a bin along one axis of the map."""

    weight: Tensor  # (samples near the map, pixels): bilinear weights
    derivative: Tensor  # the same shape: their derivatives by the position of the sample
    count: int  # number of samples in the divisor

    @classmethod
    def at(cls, mode: str, p: Tensor, pixels: int) -> Samples:
        count = len(p)
        if mode == "msra":
            count = int(((p >= -0.5) & (p <= pixels - 0.5)).sum())
        p = p[(p >= -1) & (p <= pixels)][:, None]  # further away no mode reads a pixel
        if mode == "bin":
            # Eq. 3-4: pixels outside the map count as zero. The derivative is the right-hand
            # one, also at -1, where the first pixel starts to fade in.
            return cls(g(pixels, p), g_derivative(pixels, p), count)
        margin = 1.0 if mode == "align" else 0.5
        kept = (p >= -margin) & (p <= pixels - 1 + margin)
        # The derivative of clamped samples is 0; right of the last pixel they are clamped.
        has_gradient = kept & (p >= 0) & (p < pixels - 1)
        if mode == "msra":
            has_gradient &= p != p.floor()  # both corners are the same pixel
        return cls(
            g(pixels, p.clamp(0, pixels - 1)) * kept, g_derivative(pixels, p) * has_gradient, count
        )


class Bin(NamedTuple):
    """One bin of one RoI, for the channels of one class."""

    index: tuple[int, int, int]  # RoI, row and column
    channels: slice  # of the output
    part: tuple[int, int, int]  # of the offset: class, row and column
    maps: Tensor  # (channels, H, W): the feature maps that it reads
    y: Samples
    x: Samples
    divisor: int
    offset_scale: tuple[float, float]  # pixels per unit of the offset, (y, x)


def visit_bins(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mode: str = "align",
    part_size: Pair | None = None,
    group_size: Pair | None = None,
) -> Iterator[Bin]:
    """Yields all bins, RoI by RoI, row by row, class by class."""
    parts, group = part_size or output_size, group_size or output_size
    score_maps = input.unflatten(1, (-1, *group))  # (N, C, G_h, G_w, H, W)
    classes = 1 if offset is None else offset.shape[1] // 2
    per_class = score_maps.shape[1] // classes
    for k, (image, *corners) in enumerate(boxes.tolist()):
        bins = itertools.product(range(output_size[0]), range(output_size[1]), range(classes))
        for i, j, class_index in bins:
            part = (class_index, i * parts[0] // output_size[0], j * parts[1] // output_size[1])
            axes, offset_scale = [], []
            for axis, index in ((0, i), (1, j)):
                low, high = corners[1 - axis], corners[3 - axis]
                start, size = side_on_map(mode, low, high, spatial_scale)
                p = positions(mode, start, size, index, output_size[axis], sampling_ratio)
                if offset is not None:  # channels 2k = x, 2k + 1 = y
                    p = p + gamma * offset[k, 2 * class_index + 1 - axis, part[1], part[2]] * size
                axes.append(Samples.at(mode, p, input.shape[2 + axis]))
                offset_scale.append(gamma * size)
            group_row, group_column = i * group[0] // output_size[0], j * group[1] // output_size[1]
            channels = slice(class_index * per_class, (class_index + 1) * per_class)
            maps = score_maps[int(image), channels, group_row, group_column]
            divisor = max(axes[0].count * axes[1].count, 1)
            yield Bin((k, i, j), channels, part, maps, *axes, divisor, tuple(offset_scale))


def read(maps: Tensor, along_y: Tensor, along_x: Tensor) -> Tensor:
    """Returns the sum over all samples of Eq. 3: (C, H, W) -> (C)."""
    return maps @ along_x.sum(0) @ along_y.sum(0)


def deform_ps_roi_pool(
    input: Tensor, boxes: Tensor, offset: Tensor | None, output_size: Pair, **options: Any
) -> Tensor:
    """Returns Eq. 5 and 6, or the same in another mode; differentiable.

    With group_size=(1, 1) it is RoI pooling.
    """
    bins = list(visit_bins(input, boxes, offset, output_size, **options))
    group = options.get("group_size") or output_size
    channels = input.shape[1] // (group[0] * group[1])
    if not bins:
        zero = 0 * input.sum() + (0 if offset is None else 0 * offset.sum())
        return input.new_zeros(0, channels, *output_size) + zero
    values = [read(b.maps, b.y.weight, b.x.weight) / b.divisor for b in bins]
    shape = (boxes.shape[0], *output_size, channels)  # classes are contiguous in the last axis
    return torch.cat(values).reshape(shape).permute(0, 3, 1, 2)


def offset_gradient(
    grad_output: Tensor,
    input: Tensor,
    boxes: Tensor,
    offset: Tensor,
    output_size: Pair,
    **options: Any,
) -> Tensor:
    """Returns the gradient of the offset by Eq. 8, with the rules for integers and borders."""
    result = torch.zeros_like(offset)
    for b in visit_bins(input, boxes, offset, output_size, **options):
        (k, i, j), (class_index, row, column) = b.index, b.part
        grad = grad_output[k, b.channels, i, j] / b.divisor
        along_x = (grad * read(b.maps, b.y.weight, b.x.derivative)).sum()
        along_y = (grad * read(b.maps, b.y.derivative, b.x.weight)).sum()
        result[k, 2 * class_index, row, column] += b.offset_scale[1] * along_x
        result[k, 2 * class_index + 1, row, column] += b.offset_scale[0] * along_y
    return result
