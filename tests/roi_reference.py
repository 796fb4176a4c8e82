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

    weight: Tensor  # (samples, pixels): how much each reads of each pixel
    slope: Tensor  # (samples, pixels): the derivative of that by the sample's position
    kept: Tensor  # (samples)

    @classmethod
    def at(cls, mode: str, p: Tensor, pixels: int) -> Samples:
        if mode == "bin":
            # Eq. 3-4: pixels outside the map count as zero. The slope is that from the right,
            # at -1 as well: there the first pixel begins to fade in.
            return cls(g(pixels, p[:, None]), g_slope(pixels, p[:, None]), torch.ones_like(p))
        border = 1.0 if mode == "align" else 0.5
        kept = ~((p < -border) | (p > pixels - 1 + border))
        weight = g(pixels, p.clamp(0, pixels - 1)[:, None])
        # At the last pixel the next position to the right is clamped.
        moves = kept & (p >= 0) & (p < pixels - 1)
        if mode == "msra":
            moves &= p != p.floor()  # both corners are the same pixel
        slope = g_slope(pixels, p[:, None])
        return cls(weight * kept[:, None], slope * moves[:, None], kept)


class Bin(NamedTuple):
    """One bin of one RoI, for the channels of one class."""

    roi: int
    row: int
    column: int
    channels: slice  # of the output
    cell: tuple[int, int, int]  # of the offset: class, row and column of the part
    maps: Tensor  # (channels, H, W): what it reads
    y: Samples
    x: Samples
    divisor: float
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
    channels = input.shape[1] // (group[0] * group[1])
    classes = 1 if offset is None else offset.shape[1] // 2
    per_class = channels // classes
    for k, (image, *corners) in enumerate(boxes.tolist()):
        places = itertools.product(range(output_size[0]), range(output_size[1]), range(classes))
        for i, j, of_class in places:
            cell = (of_class, i * part[0] // output_size[0], j * part[1] // output_size[1])
            outputs = range(of_class * per_class, (of_class + 1) * per_class)
            group_row, group_column = i * group[0] // output_size[0], j * group[1] // output_size[1]
            reads = [(c * group[0] + group_row) * group[1] + group_column for c in outputs]
            axes, reach = [], []
            for axis, index in ((0, i), (1, j)):
                low, high = corners[1 - axis], corners[3 - axis]
                start, size = side_on_map(mode, low, high, spatial_scale)
                p = positions(mode, start, size, index, output_size[axis], sampling_ratio)
                if offset is not None:  # planes 2k = x, 2k + 1 = y
                    p = p + gamma * offset[k, 2 * of_class + 1 - axis, cell[1], cell[2]] * size
                axes.append(Samples.at(mode, p, input.shape[2 + axis]))
                reach.append(gamma * size)
            y, x = axes
            divisor = len(y.kept) * len(x.kept)
            if mode == "msra":
                divisor = (y.kept.sum() * x.kept.sum()).item()
            maps = input[int(image), reads]
            yield Bin(
                k, i, j, slice(outputs.start, outputs.stop), cell, maps, y, x, divisor, tuple(reach)
            )


def read(maps: Tensor, along_y: Tensor, along_x: Tensor) -> Tensor:
    """Returns the sum over all samples of Eq. 3, (C) from (C, H, W)."""
    return torch.einsum("ih,jw,chw->c", along_y, along_x, maps)


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
        return input.new_zeros(0, channels, *output_size) + 0 * input.sum()
    values = [read(b.maps, b.y.weight, b.x.weight) / max(b.divisor, 1) for b in bins]
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
        grad = grad_output[b.roi, b.channels, b.row, b.column] / max(b.divisor, 1)
        of_class, row, column = b.cell
        along_x = (grad * read(b.maps, b.y.weight, b.x.slope)).sum()
        along_y = (grad * read(b.maps, b.y.slope, b.x.weight)).sum()
        result[b.roi, 2 * of_class, row, column] += b.reach[1] * along_x
        result[b.roi, 2 * of_class + 1, row, column] += b.reach[0] * along_y
    return result
