# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Exact conversion of masks to COCO's polygons."""

from __future__ import annotations

import cv2
import numpy as np


def mask_to_polygons(mask: np.ndarray) -> list[list[float]]:
    """Returns polygons along pixel edges, which pycocotools rasterizes to the same mask.

    COCO's polygons have no holes: a cut of zero width connects a hole with the outer contour.

    Args:
        mask: (height, width), nonzero inside.
    """
    height, width = mask.shape
    # findContours returns pixel centres. On a grid of twice the resolution a pixel covers 3x3
    # points, the outer ones of which lie on its edges.
    fine = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    fine[1::2, 1::2] = mask != 0
    fine = cv2.dilate(fine, np.ones((3, 3), np.uint8))
    contours, hierarchy = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parents = [] if hierarchy is None else hierarchy[0, :, 3].tolist()  # -1 for outer contours
    outer = {number: contours[number][:, 0] for number, parent in enumerate(parents) if parent < 0}
    for contour, parent in zip(contours, parents, strict=True):
        if parent >= 0:
            hole, around = contour[:, 0], outer[parent]
            # From the outer contour's start to the hole, around it and back.
            outer[parent] = np.concatenate([around, around[:1], hole, hole[:1]])
    return [(points / 2).ravel().tolist() for points in outer.values()]
