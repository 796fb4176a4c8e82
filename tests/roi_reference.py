# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI pooling in float64: Eq. 5, 6 and 8 (mode `bin`), and the two other ways to sample a bin.

For finite boxes and offsets. As in the library, (i, j) is (row, column); the paper's i is the
column.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.reference import g, g_slope

Pair = tuple[int, int]


def round_half_away(value: float) -> float:
    """Returns the nearest integer, of two the one further from zero."""
    whole = math.trunc(value)
    return whole + math.copysign(abs(value - whole) >= 0.5, value)


def side_on_map(mode: str, low: float, high: float, scale: float) -> tuple[float, float]:
    """Returns where a RoI starts on the map, p0, and its size, w or h, along one axis."""
    if mode == "align":
        start = low * scale - 0.5
        return start, high * scale - 0.5 - start
    if mode == "bin":
        start = math.floor(low * scale + 0.5)
        return start, max(math.floor(high * scale + 0.5) - start, 1)
    start = round_half_away(low) * scale - 0.5
    return start, max((round_half_away(high) + 1) * scale - 0.5 - start, 0.1)


def positions(mode: str, start: float, size: float, j: int, bins: int, ratio: int) -> Tensor:
    """Returns where bin j samples along one axis, not displaced."""
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

    weight: Tensor  # (samples near the map, pixels): how much each reads of each pixel
    slope: Tensor  # the same shape: the derivative of that by the sample's position
    count: int  # of all samples that the divisor counts

    @classmethod
    def at(cls, mode: str, p: Tensor, pixels: int) -> Samples:
        count = len(p)
        if mode == "msra":
            count = int(((p >= -0.5) & (p <= pixels - 0.5)).sum())
        p = p[(p >= -1) & (p <= pixels)][:, None]  # no mode reads a pixel from further away
        if mode == "bin":
            # Eq. 3-4: pixels outside the map count as zero. The slope is that from the right,
            # at -1 as well: there the first pixel begins to fade in.
            return cls(g(pixels, p), g_slope(pixels, p), count)
        beyond = 1.0 if mode == "align" else 0.5
        kept = (p >= -beyond) & (p <= pixels - 1 + beyond)
        # Clamped samples do not move; at the last pixel the next position to the right is clamped.
        moves = kept & (p >= 0) & (p < pixels - 1)
        if mode == "msra":
            moves &= p != p.floor()  # both corners are the same pixel
        return cls(g(pixels, p.clamp(0, pixels - 1)) * kept, g_slope(pixels, p) * moves, count)


class Bin(NamedTuple):
    """One bin of one RoI, for the channels of one class."""

    place: tuple[int, int, int]  # RoI, row and column
    channels: slice  # of the output
    cell: tuple[int, int, int]  # of the offset: class, row and column of the part
    maps: Tensor  # (channels, H, W): what it reads
    y: Samples
    x: Samples
    divisor: int
    reach: tuple[float, float]  # pixels per unit of the offset, (y, x)


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
    part, group = part_size or output_size, group_size or output_size
    score_maps = input.unflatten(1, (-1, *group))  # (N, C, G_h, G_w, H, W)
    classes = 1 if offset is None else offset.shape[1] // 2
    per_class = score_maps.shape[1] // classes
    for k, (image, *corners) in enumerate(boxes.tolist()):
        places = itertools.product(range(output_size[0]), range(output_size[1]), range(classes))
        for i, j, of_class in places:
            cell = (of_class, i * part[0] // output_size[0], j * part[1] // output_size[1])
            axes, reach = [], []
            for axis, index in ((0, i), (1, j)):
                low, high = corners[1 - axis], corners[3 - axis]
                start, size = side_on_map(mode, low, high, spatial_scale)
                p = positions(mode, start, size, index, output_size[axis], sampling_ratio)
                if offset is not None:  # planes 2k = x, 2k + 1 = y
                    p = p + gamma * offset[k, 2 * of_class + 1 - axis, cell[1], cell[2]] * size
                axes.append(Samples.at(mode, p, input.shape[2 + axis]))
                reach.append(gamma * size)
            group_row, group_column = i * group[0] // output_size[0], j * group[1] // output_size[1]
            channels = slice(of_class * per_class, (of_class + 1) * per_class)
            maps = score_maps[int(image), channels, group_row, group_column]
            divisor = max(axes[0].count * axes[1].count, 1)
            yield Bin((k, i, j), channels, cell, maps, *axes, divisor, tuple(reach))


def read(maps: Tensor, along_y: Tensor, along_x: Tensor) -> Tensor:
    """Returns the sum over all samples of Eq. 3, (C) from (C, H, W)."""
    return maps @ along_x.sum(0) @ along_y.sum(0)


def deform_ps_roi_pool(
    input: Tensor, boxes: Tensor, offset: Tensor | None, output_size: Pair, **options: Any
) -> Tensor:
    """Returns Eq. 5 and 6 or what another mode makes of them, differentiable.

    With group_size=(1, 1) it is RoI pooling.
    """
    bins = list(visit_bins(input, boxes, offset, output_size, **options))
    group = options.get("group_size") or output_size
    channels = input.shape[1] // (group[0] * group[1])
    if not bins:
        nothing = 0 * input.sum() + (0 if offset is None else 0 * offset.sum())
        return input.new_zeros(0, channels, *output_size) + nothing
    values = [read(b.maps, b.y.weight, b.x.weight) / b.divisor for b in bins]
    shape = (boxes.shape[0], *output_size, channels)  # the classes side by side in the last
    return torch.cat(values).reshape(shape).permute(0, 3, 1, 2)


def offset_gradient(
    grad_output: Tensor,
    input: Tensor,
    boxes: Tensor,
    offset: Tensor,
    output_size: Pair,
    **options: Any,
) -> Tensor:
    """Returns the gradient of the offset by Eq. 8, with the rules at integers and borders."""
    result = torch.zeros_like(offset)
    for b in visit_bins(input, boxes, offset, output_size, **options):
        (k, i, j), (of_class, row, column) = b.place, b.cell
        grad = grad_output[k, b.channels, i, j] / b.divisor
        along_x = (grad * read(b.maps, b.y.weight, b.x.slope)).sum()
        along_y = (grad * read(b.maps, b.y.slope, b.x.weight)).sum()
        result[k, 2 * of_class, row, column] += b.reach[1] * along_x
        result[k, 2 * of_class + 1, row, column] += b.reach[0] * along_y
    return result
