# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI pooling in mode `align` as ATen ops, for compilers and exporters without our kernels."""

from __future__ import annotations

import torch
from torch import Tensor

"""
Shape shorthand in this module, beyond that of roi_pool.py:

    G: groups of score maps, G_h * G_w
    S: samples per bin along one axis
"""


def check_can_decompose(mode: str, sampling_ratio: int) -> None:
    """Raises NotImplementedError for RoI pooling that standard operators do not express.

    Args:
        mode: as in `deform_roi_pool`.
        sampling_ratio: as in `deform_roi_pool`.
    """
    if mode != "align":
        raise NotImplementedError(
            f"deform_roi_pool: only mode 'align' is available as standard operators, got {mode!r}; "
            "set mode='align' and a sampling_ratio of at least 1 before the export"
        )
    if sampling_ratio < 1:
        raise NotImplementedError(
            "deform_roi_pool: the number of samples must be fixed to be expressed as standard "
            f"operators, got sampling_ratio={sampling_ratio}, which takes it from each box; "
            "set a sampling_ratio of at least 1, such as 2, before the export"
        )


def decompose_deform_roi_pool(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: list[int],
    part_size: list[int],
    group_size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    mode: str,
) -> Tensor:
    """Computes what the op `dcn_plugin::deform_roi_pool` does, without argument checks.

    Every sample reads its four pixels from a table with a row for each pixel, map and class.

    Args:
        input: the arguments of the op.
        boxes: as above.
        offset: as above.
        output_size: as above.
        part_size: as above.
        group_size: as above.
        spatial_scale: as above.
        sampling_ratio: as above, at least 1.
        gamma: as above.
        mode: "align".

    Raises:
        NotImplementedError: for another mode or sampling ratio.
    """
    check_can_decompose(mode, sampling_ratio)
    (height, width), classes = input.shape[2:], 1 if offset is None else offset.shape[1] // 2
    boxes = boxes.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    taps = []
    for axis, extent in ((0, height), (1, width)):
        bins = output_size[axis]
        corners = boxes[:, 2 - axis], boxes[:, 4 - axis]
        start, size = _box_side(*corners, spatial_scale)
        index = torch.arange(bins, device=boxes.device, dtype=boxes.dtype)
        position = start[:, None] + index * (size / bins)[:, None]  # (K, bins)
        position = position.reshape(-1, 1, *((bins, 1) if axis == 0 else (1, bins)))
        size = size[:, None, None, None]
        if offset is not None:  # channels 2k are x, 2k + 1 are y
            parts = _by_bin(offset[:, 1 - axis :: 2].to(boxes.dtype), output_size, part_size)
            position = position + parts * (gamma * size)
        step = size / bins / sampling_ratio
        samples = torch.arange(sampling_ratio, device=boxes.device, dtype=boxes.dtype)
        position = (position + 0.5 * step)[..., None] + samples * step[..., None]
        taps.append(_taps(position, extent))  # (K, n, P_h, P_w, S), sizes 1 where it is the same
    table = _pixel_table(input, classes, group_size)
    first = _first_rows(boxes[:, 0], input, classes, output_size, group_size)[..., None, None]
    pooled = 0
    for row, row_weight in taps[0]:
        for column, column_weight in taps[1]:
            pixel = first + row[..., :, None] * width + column[..., None, :]
            weight = row_weight[..., :, None] * column_weight[..., None, :]
            # (K, n, P_h, P_w, S, S, C/n) -> (K, n, P_h, P_w, C/n)
            pooled = pooled + (table[pixel] * weight[..., None]).sum((-3, -2))
    pooled = pooled / sampling_ratio**2
    # -> (K, n, C/n, P_h, P_w) -> (K, C, P_h, P_w)
    pooled = pooled.permute(0, 1, 4, 2, 3).flatten(1, 2)
    # An infinite coordinate gives NaN above, and 0 in the op.
    corners = boxes[:, 1:]
    empty = corners.isinf().any(1) & ~corners.isnan().any(1)
    return torch.where(empty[:, None, None, None], 0, pooled).to(input.dtype)


def _box_side(low: Tensor, high: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns start and size of boxes on the map, along one axis."""
    start = low * scale - 0.5
    return start, high * scale - 0.5 - start


def _by_bin(parts: Tensor, output_size: list[int], part_size: list[int]) -> Tensor:
    """Returns the part of every bin, (K, n, part_h, part_w) -> (K, n, P_h, P_w)."""
    for axis, (bins, count) in enumerate(zip(output_size, part_size, strict=True)):
        if bins != count:
            index = torch.arange(bins, device=parts.device) * count // bins
            parts = parts.index_select(2 + axis, index)
    return parts


def _taps(position: Tensor, extent: int) -> list[tuple[Tensor, Tensor]]:
    """Returns index and weight of the two pixels that a sample reads along one axis.

    Args:
        position: of the samples. NaN gives NaN as weight.
        extent: of the map.
    """
    skipped = (position < -1) | (position > extent)
    inside = position.clamp(0, extent - 1)
    low = inside.floor()
    weight = inside - low
    index = torch.where(low.isnan(), 0, low).long()
    return [
        (index, torch.where(skipped, 0, 1 - weight)),
        ((index + 1).clamp(max=extent - 1), torch.where(skipped, 0, weight)),
    ]


def _pixel_table(input: Tensor, classes: int, group_size: list[int]) -> Tensor:
    """Returns a row per pixel, (N, n * C/n * G, H, W) -> (N * G * n * H * W, C/n)."""
    images, channels, height, width = input.shape
    groups = group_size[0] * group_size[1]
    split = input.reshape(images, classes, channels // classes // groups, groups, height * width)
    return split.permute(0, 3, 1, 4, 2).reshape(-1, channels // classes // groups)


def _first_rows(
    image: Tensor, input: Tensor, classes: int, output_size: list[int], group_size: list[int]
) -> Tensor:
    """Returns the row of the first pixel that a bin may read, (K, n, P_h, P_w)."""
    rows, columns = (
        torch.arange(bins, device=input.device) * count // bins
        for bins, count in zip(output_size, group_size, strict=True)
    )
    group = rows[:, None] * group_size[1] + columns
    map_index = image.long()[:, None, None] * (group_size[0] * group_size[1]) + group
    class_index = torch.arange(classes, device=input.device)[:, None, None]
    return (map_index[:, None] * classes + class_index) * (input.shape[2] * input.shape[3])
