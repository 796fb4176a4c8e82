# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""pycocotools rasterizes the polygons of a mask to the same mask."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as coco_masks
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dcn_plugin.data.shapes import SETS
from dcn_plugin.data.shapes.drawing import draw_image
from dcn_plugin.data.shapes.polygons import mask_to_polygons


def rasterized(polygons: list[list[float]], shape: tuple[int, int]) -> np.ndarray:
    if not polygons:
        return np.zeros(shape, np.uint8)
    return coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(polygons, *shape)))


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_any_mask_is_restored(mask: np.ndarray) -> None:
    polygons = mask_to_polygons(mask)
    assert all(len(polygon) >= 6 for polygon in polygons)
    assert np.array_equal(rasterized(polygons, mask.shape), mask)


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_objects_are_restored(seed: int) -> None:
    drawn = draw_image(SETS["hard"], np.random.default_rng(seed))
    for number in range(len(drawn.classes)):
        mask = drawn.instance_ids == number + 1
        assert np.array_equal(rasterized(mask_to_polygons(mask), mask.shape), mask)


def test_a_hole_stays_open() -> None:
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    (polygon,) = mask_to_polygons(ring)
    assert rasterized([polygon], (5, 5)).sum() == 24
