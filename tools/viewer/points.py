# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Points of an image from which it is worth looking."""

from __future__ import annotations

import cv2
import numpy as np

Point = tuple[float, float]  # x and y


def emptiest_point(size: tuple[int, int], boxes: np.ndarray) -> Point:
    """Returns the point that is farthest from all boxes, and not at the very border.

    Args:
        size: height and width of the image.
        boxes: (M, 4), left, top, right, bottom.
    """
    height, width = size
    ys, xs = np.mgrid[1:16, 1:16] / 16 * np.array([height, width])[:, None, None]
    distance = np.full(xs.shape, np.inf)
    for left, top, right, bottom in boxes:
        dx = np.maximum(np.maximum(left - xs, xs - right), 0)
        dy = np.maximum(np.maximum(top - ys, ys - bottom), 0)
        distance = np.minimum(distance, np.hypot(dx, dy))
    best = np.unravel_index(distance.argmax(), distance.shape)
    return float(xs[best]), float(ys[best])


def innermost_point(mask: np.ndarray) -> Point:
    """Returns the point of a mask that is farthest from its outline.

    Args:
        mask: (height, width), not 0 inside.
    """
    padded = np.pad((mask != 0).astype(np.uint8), 1)  # the border of the image is an outline too
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return float(x), float(y)
