# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Reference losses of detectors on Python floats, one box at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = Sequence[float]


def cross_entropy(logits: Sequence[float], label: int) -> float:
    """Returns the softmax loss of one sample."""
    return math.log(sum(math.exp(value) for value in logits)) - logits[label]


def deltas(box: Box, gt: Box, weights: Sequence[float]) -> list[float]:
    """Encodes a ground-truth box relative to a box."""
    width, height = box[2] - box[0], box[3] - box[1]
    gt_width, gt_height = gt[2] - gt[0], gt[3] - gt[1]
    dx = ((gt[0] + gt[2]) / 2 - (box[0] + box[2]) / 2) / width
    dy = ((gt[1] + gt[3]) / 2 - (box[1] + box[3]) / 2) / height
    coded = dx, dy, math.log(gt_width / width), math.log(gt_height / height)
    return [w * value for w, value in zip(weights, coded, strict=True)]


def smooth_l1(predicted: Sequence[float], wanted: Sequence[float], beta: float) -> float:
    """Returns the sum over the four numbers of a box."""
    total = 0.0
    for difference in (abs(p - w) for p, w in zip(predicted, wanted, strict=True)):
        quadratic = beta > 0 and difference < beta
        total += difference**2 / (2 * beta) if quadratic else difference - beta / 2
    return total


def iou(one: Box, other: Box) -> float:
    """Returns the intersection over the union."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, other)]
    return common / (sum(areas) - common) if common > 0 else 0.0
