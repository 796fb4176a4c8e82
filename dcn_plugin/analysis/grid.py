# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Where on the image the cells of a map lie, and what ops do to that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

Pair = tuple[float, float]  # of rows and of columns


AXES = (2, 3)  # of a map that are rows and columns


@dataclass(frozen=True)
class Grid:
    """The cells of a map, which lie at equal distances."""

    start: Pair = (0.0, 0.0)  # the middle of the first, in pixels of the image
    step: Pair = (1.0, 1.0)  # from one to the next
    axes: tuple[int, int] = AXES  # of the tensor that are rows and columns

    def to_pixels(self, cells: Tensor) -> Tensor:
        """Turns Tensor[..., 2] of rows and columns into pixels of the image."""
        start, step = (torch.tensor(each, device=cells.device) for each in (self.start, self.step))
        return cells * step + start

    def to_cells(self, pixels: Tensor) -> Tensor:
        """Turns Tensor[..., 2] of pixels of the image into rows and columns, with fractions."""
        start, step = (torch.tensor(each, device=pixels.device) for each in (self.start, self.step))
        return (pixels - start) / step

    def picked(self, first: Pair, every: Pair) -> Grid:
        """Returns the grid of cells that lie at `first`, `first + every`, … in cells of this."""
        start = tuple(a + b * c for a, b, c in zip(self.start, self.step, first, strict=True))
        step = tuple(a * b for a, b in zip(self.step, every, strict=True))
        return replace(self, start=start, step=step)

    def windows(self, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Grid | None:
        """Returns the grid of what is made of windows of this one, each a number or a pair.

        Windows lie on AXES: of a tensor with rows and columns elsewhere nothing is known.
        """
        if self.axes != AXES:
            return None
        reach = zip(pair(dilation), pair(kernel), pair(padding), strict=True)
        first = tuple(apart * (taps - 1) / 2 - border for apart, taps, border in reach)
        return self.picked(first, pair(stride))


Given = Mapping[str, Any]  # arguments of an op by their names in its schema
Rule = Callable[[Grid, Tensor, Given, Tensor], Grid | None]  # of a map, and what is made of it


def pair(value: float | Sequence[float]) -> tuple[Any, Any]:
    """Returns a pair of a number, of one in a sequence, or of two."""
    values = (value,) if isinstance(value, int | float) else tuple(value)
    return (values[0], values[-1])


def _convolution(grid: Grid, x: Tensor, given: Given, out: Tensor) -> Grid | None:
    kernel = given["weight"].shape[2:]
    spacing = [given[key] for key in ("stride", "padding", "dilation")]
    if len(kernel) != 2:
        return None
    made = grid.windows(kernel, *spacing)
    if made is None or not given["transposed"]:
        return made
    # Cell i of the input lies in the middle of what it is spread over.
    inner = Grid().windows(kernel, *spacing)
    first = tuple(-start / step for start, step in zip(inner.start, inner.step, strict=True))
    return grid.picked(first, tuple(1 / step for step in inner.step))


def _pooling(grid: Grid, x: Tensor, given: Given, out: Tensor) -> Grid | None:
    kernel = given["kernel_size"]
    stride = given["stride"] or kernel
    return grid.windows(kernel, stride, given["padding"], given.get("dilation", 1))


def _resized(grid: Grid, x: Tensor, given: Given, out: Tensor) -> Grid | None:
    if grid.axes != AXES:
        return None
    sizes = [(x.shape[axis], out.shape[axis]) for axis in grid.axes]
    if given.get("align_corners"):
        every = tuple((before - 1) / max(after - 1, 1) for before, after in sizes)
        return grid.picked((0, 0), every)
    every = tuple(before / after for before, after in sizes)
    return grid.picked(tuple((ratio - 1) / 2 for ratio in every), every)


def _padded(grid: Grid, x: Tensor, given: Given, out: Tensor) -> Grid:
    before = [*(given.get("pad") or given["padding"])[::2]]  # of the last axis first
    missing = [0] * (x.dim() - len(before))
    borders = [*missing, *reversed(before)]
    return grid.picked(tuple(-borders[axis] for axis in grid.axes), (1, 1))


def _sliced(grid: Grid, x: Tensor, given: Given, out: Tensor) -> Grid:
    axis = given["dim"] % x.dim()
    start, _, every = slice(given["start"], given["end"], given["step"]).indices(x.shape[axis])
    return grid.picked(
        tuple(start if axis == own else 0 for own in grid.axes),
        tuple(every if axis == own else 1 for own in grid.axes),
    )


def _permuted(grid: Grid, x: Tensor, given: Given, out: Tensor) -> Grid:
    dims = [dim % x.dim() for dim in given["dims"]]
    return replace(grid, axes=tuple(dims.index(axis) for axis in grid.axes))


def _transposed(grid: Grid, x: Tensor, given: Given, out: Tensor) -> Grid:
    dims = list(range(x.dim()))
    one, other = given["dim0"] % x.dim(), given["dim1"] % x.dim()
    dims[one], dims[other] = other, one
    return _permuted(grid, x, {"dims": dims}, out)


def _viewed(grid: Grid, x: Tensor, given: Given, out: Tensor) -> Grid | None:
    """Finds axes in another shape: those of the same size, behind as many numbers."""
    before = [prod(x.shape[:axis]) for axis in grid.axes]
    lengths = [1, *accumulate(out.shape, lambda one, other: one * other)]
    places = [(size, lengths[axis]) for axis, size in enumerate(out.shape)]
    found = []
    for axis, ahead in zip(grid.axes, before, strict=True):
        wanted = (x.shape[axis], ahead)
        free = [place for place, has in enumerate(places) if has == wanted and place not in found]
        if not free:
            return None
        found.append(free[0])
    return replace(grid, axes=tuple(found))


def _split(grid: Grid, x: Tensor, given: Given, out: Tensor) -> Grid | None:
    return None if given["dim"] % x.dim() in grid.axes else grid


def _lost(grid: Grid, x: Tensor, given: Given, out: Tensor) -> None:
    return None


OPS: dict[Rule, tuple[str, ...]] = {
    _convolution: ("aten::convolution",),
    _pooling: ("aten::max_pool2d_with_indices", "aten::avg_pool2d"),
    _resized: (
        *("aten::_adaptive_avg_pool2d", "aten::adaptive_max_pool2d"),
        *("aten::upsample_nearest2d", "aten::_upsample_nearest_exact2d"),
        *("aten::upsample_bilinear2d", "aten::upsample_bicubic2d"),
    ),
    _padded: ("aten::constant_pad_nd", "aten::reflection_pad2d", "aten::replication_pad2d"),
    _sliced: ("aten::slice",),
    _permuted: ("aten::permute",),
    _transposed: ("aten::transpose",),
    _viewed: ("aten::view", "aten::_unsafe_view"),
    _split: ("aten::split", "aten::split_with_sizes"),
    _lost: (
        # What keeps the size, and can move cells.
        *("aten::flip", "aten::roll", "aten::sort", "aten::gather"),
        *("aten::index", "aten::_unsafe_index", "aten::index_select"),
        *("aten::grid_sampler_2d", "aten::cudnn_grid_sampler"),
        # What has nothing of the map but its size.
        *(f"aten::new_{what}" for what in ("empty", "zeros", "ones", "full")),
        *(f"aten::{what}_like" for what in ("empty", "zeros", "ones", "full")),
        # What makes RoIs of a map.
        *("torchvision::roi_align", "torchvision::roi_pool"),
        *("torchvision::ps_roi_align", "torchvision::ps_roi_pool"),
        "dcn_plugin::deform_roi_pool",
    ),
}
RULES = {op: rule for rule, ops in OPS.items() for op in ops}


def carried_on(grid: Grid, x: Tensor, out: Tensor) -> Grid | None:
    """Returns the grid of what an op without a rule made: the same, if the sizes are the same."""
    axes = {*grid.axes, 0}
    same = out.dim() == x.dim() and all(out.shape[axis] == x.shape[axis] for axis in axes)
    return grid if same else None
