# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Where the bins of deformable RoI pooling move (Figure 7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dcn_plugin.layers import DeformPSRoIPool, DeformRoIPool
from dcn_plugin.ops.roi_pool import join_boxes

"""
Shape shorthand in this module:

    R: RoIs, n: classes with offsets of their own, P_h, P_w: bins
"""

Pool = DeformRoIPool | DeformPSRoIPool


@dataclass(frozen=True)
class Parts:
    """The bins of RoIs, in pixels of the image as the network saw it."""

    layer: str
    images: Tensor  # (R,), which image of the batch a RoI is of
    boxes: Tensor  # (R, 4), left, top, right, bottom
    resting: Tensor  # (R, P_h, P_w, 4), bins as they would be without offsets
    bins: Tensor  # (R, n, P_h, P_w, 4), where they are

    def overlaps(self, box: Tensor, image: int = 0) -> Tensor:
        """Returns Tensor[R], the IoU of all RoIs with a box, -1 of those of other images.

        Args:
            box: Tensor[4].
            image: of the batch.
        """
        box = box.to(self.boxes)
        low, high = self.boxes[:, :2].maximum(box[:2]), self.boxes[:, 2:].minimum(box[2:])
        common = (high - low).clamp(min=0).prod(dim=1)
        areas = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(dim=1)
        union = areas + (box[2:] - box[:2]).prod() - common
        return (common / union.clamp(min=1e-6)).where(self.images == image, -1.0)


def nearest_roi(
    parts: Mapping[str, Parts], box: Tensor, image: int = 0
) -> tuple[Parts, int] | None:
    """Returns the RoI that overlaps a box the most, of any level of a pyramid.

    Args:
        parts: of a network, as `record_parts` yields them; of equals the first.
        box: Tensor[4], left, top, right, bottom.
        image: of the batch.

    Returns:
        the parts it is among, and its place there; None if the image has no RoIs.
    """
    best, found = -1.0, None
    for each in parts.values():
        overlaps = each.overlaps(box, image)
        if len(overlaps) and float(overlaps.max()) > best:
            best, found = float(overlaps.max()), (each, int(overlaps.argmax()))
    return found


def deformable_pools(model: nn.Module) -> dict[str, Pool]:
    """Returns the deformable RoI poolings of a network by name; there may be none."""
    found = model.named_modules()
    return {name: module for name, module in found if isinstance(module, Pool)}


@contextmanager
def record_parts(model: nn.Module) -> Iterator[dict[str, Parts]]:
    """Records where the bins of deformable RoI pooling move while a network runs.

    Args:
        model: any network.

    Yields:
        parts by layer, in the order in which they ran; of one that ran several times the last.
    """
    found: dict[str, Parts] = {}
    handles = [
        pool.register_forward_hook(_of_pool(found, name), with_kwargs=True)
        for name, pool in deformable_pools(model).items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def parts_of(pool: Pool, name: str, boxes: Tensor, offset: Tensor) -> Parts:
    """Computes the bins of RoIs.

    Args:
        pool: which has their mode, number and gamma.
        name: of the layer.
        boxes: Tensor[R, 5] (image, x1, y1, x2, y2).
        offset: Tensor[R, 2*n, P_h, P_w], x and y of each class.
    """
    tall, wide = pool.output_size
    left, width = _axis(pool, boxes[:, 1], boxes[:, 3])
    top, height = _axis(pool, boxes[:, 2], boxes[:, 4])
    xs = left[:, None] + width[:, None] * torch.arange(wide + 1, device=boxes.device) / wide
    ys = top[:, None] + height[:, None] * torch.arange(tall + 1, device=boxes.device) / tall
    size = (len(boxes), tall, wide)
    resting = torch.stack(
        [
            xs[:, None, :-1].expand(size),
            ys[:, :-1, None].expand(size),
            xs[:, None, 1:].expand(size),
            ys[:, 1:, None].expand(size),
        ],
        dim=-1,
    )
    moved = offset.unflatten(1, (-1, 2)).movedim(2, -1) * pool.gamma  # R, n, P_h, P_w, 2
    sizes = torch.stack([width, height], dim=-1)[:, None, None, None]
    bins = resting[:, None] + (moved * sizes).repeat(1, 1, 1, 1, 2)
    return Parts(name, boxes[:, 0].long(), boxes[:, 1:], resting, bins)


def _axis(pool: Pool, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where RoIs start along an axis and how long they are, by the mode of the pooling."""
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


def _of_pool(found: dict[str, Parts], name: str) -> Any:
    def hook(pool: Pool, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> None:
        with torch.no_grad():
            given = dict(zip(("features", "boxes"), inputs, strict=False)) | keywords
            features, boxes = given["features"].detach(), join_boxes(given["boxes"]).detach()
            offset = pool.offsets(features, boxes).float()
            found.pop(name, None)  # to be last again
            found[name] = parts_of(pool, name, boxes.float(), offset)

    return hook
