# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Masks as polygons in COCO's format, to the pixel."""

from __future__ import annotations

import cv2
import numpy as np


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Returns polygons along the edges of a mask's pixels.

    COCO's own code fills them to the same mask. A hole is reached by a cut of no width, since
    COCO's polygons cannot have any.

    Args:
        mask: (height, width), not 0 inside.
    """
    height, width = mask.shape
    # On a grid of twice as many points a pixel reaches over three, from edge to edge, so that the
    # outermost points of a contour lie on edges.
    fine = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    fine[1::2, 1::2] = mask != 0
    fine = cv2.dilate(fine, np.ones((3, 3), np.uint8))
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    outer: dict[int, np.ndarray] = {}
    for number, contour in enumerate(contours):
        parent = int(hierarchy[0, number, 3])
        if parent < 0:
            outer[number] = contour[:, 0]
    for number, contour in enumerate(contours):
        parent = int(hierarchy[0, number, 3])
        if parent >= 0:
            hole, around = contour[:, 0], outer[parent]
            # Out to the hole, around it, and back the same way.
            outer[parent] = np.concatenate([around, around[:1], hole, hole[:1]])
    return [(points / 2).ravel().tolist() for points in outer.values()]
