# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Effective dilation of deformable filters, by the size of the object under them (Table 2)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcn_plugin.messages import UserError

from .recording import RecordedLayer, Recording, record, require_deformable

logger = logging.getLogger(__name__)
AREAS = (96**2, 224**2)  # the paper's limits between small, medium and large objects
CATEGORIES = ("small", "medium", "large", "background")


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and its ground truth boxes, in pixels of the model's input."""

    inputs: Any  # the model is called with them: a batch of this one image
    boxes: Tensor  # (M, 4), x1, y1, x2, y2
    size: tuple[int, int]  # height and width without padding
    crowds: Tensor | None = None  # (C, 4), boxes that count neither as objects nor as background


@dataclass(frozen=True)
class Dilation:
    """Effective dilation of a layer's filters on one category."""

    mean: float  # in positions of the layer's input; NaN without filters
    std: float
    filters: int


def effective_dilation(
    model: nn.Module, images: Iterable[AnnotatedImage], *, areas: Sequence[float] = AREAS
) -> dict[str, dict[str, Dilation]]:
    """Measures the effective dilation of every deformable layer.

    That of a filter is the mean distance between all pairs of taps that are neighbours in its
    kernel; for a plain convolution it is the dilation. A filter counts for the smallest box that
    contains the centre of its output position, or for the background.

    Args:
        model: any model with deformable convolutions, in eval mode.
        images: to run it on.
        areas: box areas in pixels, from which on objects are medium and large.

    Returns:
        by layer, in the order in which they run, and by category. All runs of a layer in a pass
        count. Layers with one tap, or whose positions on the image are not known, are skipped with
        a warning.

    Raises:
        ValueError: if no deformable convolution can be measured, areas do not ascend, or a batch
            has more than one image.
    """
    check_areas(areas)
    require_deformable(model)
    sums: dict[str, Tensor] = {}
    skipped: dict[str, str] = {}
    for image in images:
        for layer in run_once(model, image).layers.values():
            if layer.taps == 1 or not layer.on_image:
                skipped[layer.module] = layer.unknown if layer.taps > 1 else "has one tap"
                continue
            sums[layer.module] = sums.get(layer.module, 0) + _sums_of(layer, image, areas)
    for name, reason in skipped.items():
        logger.warning("effective dilation: skipped %s, which %s", name, reason)
    if not sums:
        raise UserError("no deformable layer ran whose effective dilation can be measured")
    return {name: _dilations(layer_sums) for name, layer_sums in sums.items()}


def run_once(model: nn.Module, image: AnnotatedImage) -> Recording:
    """Records a forward pass on a batch of one image; raises ValueError if it has more."""
    with record(model) as recording, torch.no_grad():
        model(image.inputs)
    for layer in recording.layers.values():
        if layer.on_image and len(layer.offset) != 1:
            raise UserError(f"inputs must be a batch of one image, got one of {len(layer.offset)}")
    return recording


def check_areas(areas: Sequence[float]) -> None:
    """Raises ValueError unless areas are two ascending positive numbers."""
    if len(areas) != 2 or not 0 < areas[0] < areas[1]:
        raise UserError(f"areas must be two ascending numbers above 0, got {tuple(areas)}")


def category_of_area(area: float, areas: Sequence[float]) -> int:
    """Returns the index in CATEGORIES of an object of an area."""
    return int(area >= areas[0]) + int(area >= areas[1])


def dilation_map(layer: RecordedLayer, image: int = 0) -> Tensor:
    """Returns the effective dilation of each filter of a layer with more than one tap.

    Args:
        layer: of a recording.
        image: index in the batch.

    Returns:
        Tensor[H', W'], means over the offset groups.
    """
    grid = layer.locations(image).unflatten(3, layer.kernel_size)  # H', W', G, kh, kw, 2
    distances = [grid.diff(dim=axis).norm(dim=-1).flatten(3) for axis in (3, 4)]
    return torch.cat(distances, dim=3).mean(dim=(2, 3))


def category_map(layer: RecordedLayer, image: AnnotatedImage, areas: Sequence[float]) -> Tensor:
    """Returns what each output position of a layer is centred on.

    Args:
        layer: of a recording.
        image: that was recorded.
        areas: as in `effective_dilation`.

    Returns:
        Tensor[H', W'] of indices in CATEGORIES; -1 in crowds, unless an object is there too, and
        on the padding of the image.
    """
    device = layer.offset.device
    ys, xs = (
        torch.arange(size, device=device) * stride
        for size, stride in zip(layer.output_size, layer.output_stride, strict=True)
    )
    boxes = image.boxes.to(device)
    sizes = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    categories = torch.full(layer.output_size, CATEGORIES.index("background"), device=device)
    for box in () if image.crowds is None else image.crowds.to(device):
        categories[_inside(ys, xs, box)] = -1
    for box, area in sorted(zip(boxes, sizes, strict=True), key=lambda pair: -float(pair[1])):
        categories[_inside(ys, xs, box)] = category_of_area(float(area), areas)
    categories[ys >= image.size[0]] = -1
    categories[:, xs >= image.size[1]] = -1
    return categories


def _inside(ys: Tensor, xs: Tensor, box: Tensor) -> Tensor:
    rows, columns = (ys >= box[1]) & (ys < box[3]), (xs >= box[0]) & (xs < box[2])
    return rows[:, None] & columns


def _sums_of(layer: RecordedLayer, image: AnnotatedImage, areas: Sequence[float]) -> Tensor:
    """Returns Tensor[3, categories]: count, sum and sum of squares."""
    categories = category_map(layer, image, areas).flatten().cpu()
    values = dilation_map(layer).flatten().double().cpu()
    kept = categories >= 0
    rows = torch.stack([torch.ones_like(values), values, values**2])[:, kept]
    sums = torch.zeros(3, len(CATEGORIES), dtype=torch.float64)
    return sums.index_add_(1, categories[kept], rows)


def _dilations(sums: Tensor) -> dict[str, Dilation]:
    count, total, squares = sums
    mean = total / count  # NaN where there are no filters
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    columns = zip(CATEGORIES, mean.tolist(), std.tolist(), count.tolist(), strict=True)
    return {name: Dilation(mean, std, int(count)) for name, mean, std, count in columns}
