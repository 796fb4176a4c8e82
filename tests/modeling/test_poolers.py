# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable RoI pooling over the levels of a feature pyramid."""

from __future__ import annotations

import pytest
import torch

from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from dcn_plugin.modeling.poolers import DeformROIPooler

SCALES = (1 / 4, 1 / 8, 1 / 16)
BOXES = [
    Boxes(torch.tensor([[3.0, 5, 40, 30], [10, 8, 250, 199], [1, 2, 90, 150]])),
    Boxes(torch.tensor([[0.0, 0, 256, 200]])),
]


def maps(scales: tuple[float, ...] = SCALES) -> list[torch.Tensor]:
    return [torch.randn(2, 6, int(200 * s), int(256 * s), requires_grad=True) for s in scales]


@pytest.mark.parametrize("scales", [SCALES, SCALES[-1:]], ids=["pyramid", "one level"])
def test_starts_as_detectron2s_pooler(scales: tuple[float, ...]) -> None:
    levels = {"canonical_box_size": 100, "canonical_level": 3}
    ours = DeformROIPooler(6, 7, scales, 2, **levels)
    theirs = ROIPooler(7, scales, 2, "ROIAlignV2", **levels)
    features = maps(scales)
    torch.testing.assert_close(ours(features, BOXES), theirs(features, BOXES))


def test_each_level_learns_its_own_offsets() -> None:
    pooler = DeformROIPooler(6, 3, SCALES, 2, canonical_box_size=100, canonical_level=3)
    features = maps()
    pooler(features, BOXES).square().sum().backward()
    assert all(f.grad.abs().max() > 0 for f in features)
    gradients = [p.offset_fc.bias.grad for p in pooler.level_poolers]
    assert all(g.abs().max() > 0 for g in gradients)
    # A level without boxes gets gradients too, as DDP requires.
    pooler.zero_grad()
    pooler(features, [BOXES[0][:1], BOXES[1][:0]]).sum().backward()
    assert all(p.offset_fc.bias.grad is not None for p in pooler.level_poolers)


def test_no_boxes_at_all() -> None:
    pooler = DeformROIPooler(6, 7, SCALES)
    empty = [Boxes(torch.zeros(0, 4))] * 2
    assert pooler(maps(), empty).shape == (0, 6, 7, 7)


def test_float32_features_are_pooled_under_autocast() -> None:
    pooler = DeformROIPooler(6, 7, SCALES, 2, canonical_box_size=100, canonical_level=3)
    features = maps()
    expected = pooler(features, BOXES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = pooler(features, BOXES)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled.float(), expected, rtol=0.02, atol=0.02)
