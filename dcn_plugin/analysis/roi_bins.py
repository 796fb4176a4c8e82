# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Bins of deformable RoI pooling, with and without their offsets (Figure 7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcn_plugin.layers import DeformPSRoIPool, DeformRoIPool
from dcn_plugin.ops.roi_pool import join_boxes

"""
Shape shorthand in this module:

    R: RoIs, n: classes with separate offsets, P_h, P_w: bins
"""

Pool = DeformRoIPool | DeformPSRoIPool


@dataclass(frozen=True)
class RoIBins:
    """The bins of one pooling layer's RoIs: boxes x1, y1, x2, y2 in pixels of the model's input."""

    images: Tensor  # (R,), index in the batch
    boxes: Tensor  # (R, 4)
    undeformed: Tensor  # (R, P_h, P_w, 4)
    bins: Tensor  # (R, n, P_h, P_w, 4), moved by the offsets


def nearest_roi(
    recorded: Mapping[str, RoIBins], box: Tensor, image: int = 0
) -> tuple[RoIBins, int] | None:
    """Returns the RoI with the highest IoU with a box, of any pooling layer.

    Args:
        recorded: as `record_roi_bins` yields it.
        box: Tensor[4], x1, y1, x2, y2.
        image: index in the batch.

    Returns:
        the layer's bins and the index of the RoI among them; None if the image has no RoIs.
    """
    best, nearest = -1.0, None
    for each in recorded.values():
        overlaps = _iou(each.boxes, box.to(each.boxes)).where(each.images == image, -1.0)
        if len(overlaps) and float(overlaps.max()) > best:
            best, nearest = float(overlaps.max()), (each, int(overlaps.argmax()))
    return nearest


def _iou(boxes: Tensor, box: Tensor) -> Tensor:
    low, high = boxes[:, :2].maximum(box[:2]), boxes[:, 2:].minimum(box[2:])
    common = (high - low).clamp(min=0).prod(dim=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) + (box[2:] - box[:2]).prod()
    return common / (areas - common).clamp(min=1e-6)


def deformable_pools(model: nn.Module) -> dict[str, Pool]:
    """Returns the deformable RoI pooling layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Pool)}


@contextmanager
def record_roi_bins(model: nn.Module) -> Iterator[dict[str, RoIBins]]:
    """Records the bins of deformable RoI pooling while a model runs.

    Args:
        model: any model.

    Yields:
        bins by layer, in the order in which they ran; of the last run where there are several.
    """
    recorded: dict[str, RoIBins] = {}
    with ExitStack() as hooks:
        for name, pool in deformable_pools(model).items():
            handle = pool.register_forward_hook(_hook(recorded, name), with_kwargs=True)
            hooks.enter_context(handle)
        yield recorded


def roi_bins(pool: Pool, boxes: Tensor, offset: Tensor) -> RoIBins:
    """Computes the bins of RoIs.

    Args:
        pool: the pooling layer.
        boxes: Tensor[R, 5] (image, x1, y1, x2, y2).
        offset: Tensor[R, 2*n, P_h, P_w], x and y of each class.
    """
    height, width = pool.output_size
    left, roi_width = _extent(pool, boxes[:, 1], boxes[:, 3])
    top, roi_height = _extent(pool, boxes[:, 2], boxes[:, 4])
    xs = left[:, None] + roi_width[:, None] * torch.arange(width + 1, device=boxes.device) / width
    ys = top[:, None] + roi_height[:, None] * torch.arange(height + 1, device=boxes.device) / height
    edges = xs[:, None, :-1], ys[:, :-1, None], xs[:, None, 1:], ys[:, 1:, None]
    undeformed = torch.stack([edge.expand(-1, height, width) for edge in edges], dim=-1)
    moved = offset.unflatten(1, (-1, 2)).movedim(2, -1) * pool.gamma  # R, n, P_h, P_w, 2
    sizes = torch.stack([roi_width, roi_height], dim=-1)[:, None, None, None]
    bins = undeformed[:, None] + (moved * sizes).repeat(1, 1, 1, 1, 2)
    return RoIBins(boxes[:, 0].long(), boxes[:, 1:], undeformed, bins)


def _extent(pool: Pool, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Returns start and length of RoIs along an axis, in the sampling mode of the pooling."""
    if pool.mode == "align":
        return low, high - low
    if pool.mode == "msra":
        start = _rounded(low)
        return start, (_rounded(high) + 1 - start).clamp(min=0.1 / pool.spatial_scale)
    start = _rounded(low * pool.spatial_scale)
    size = (_rounded(high * pool.spatial_scale) - start).clamp(min=1)
    return start / pool.spatial_scale, size / pool.spatial_scale


def _rounded(value: Tensor) -> Tensor:
    return (value + 0.5).floor()


def _hook(recorded: dict[str, RoIBins], name: str) -> Any:
    def hook(pool: Pool, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        with torch.no_grad():
            given = dict(zip(("features", "boxes"), inputs, strict=False)) | kwargs
            features = given["features"].detach()
            boxes = join_boxes(given["boxes"], features).detach()
            offset = pool.offsets(features, boxes).float()
            recorded.pop(name, None)  # so that this run is the last in order
            recorded[name] = roi_bins(pool, boxes.float(), offset)

    return hook
