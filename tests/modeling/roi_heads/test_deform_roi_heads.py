# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""DeformROIHeads: which pooler the config keys choose."""

from __future__ import annotations

import pytest
import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes

from dcn_plugin.modeling import AverageROIPooler, DeformROIHeads, DeformROIPooler
from tests.modeling.networks import network_config

SHAPES = {"reduced": ShapeSpec(channels=8, stride=16)}


def make_heads(**keys: object) -> DeformROIHeads:
    cfg = network_config("faster_rcnn", deformable=False)
    for key, value in keys.items():
        cfg.MODEL.ROI_BOX_HEAD[key] = value
    return DeformROIHeads(cfg, SHAPES)


def test_the_default_type_is_our_pooling() -> None:
    assert type(make_heads().box_pooler) is AverageROIPooler
    assert type(make_heads(DEFORM=True).box_pooler) is DeformROIPooler


@pytest.mark.parametrize("pooler_type", ["ROIPool", "ROIAlign", "ROIAlignV2"])
def test_pooler_type_is_honoured(pooler_type: str) -> None:
    cfg = network_config("faster_rcnn", deformable=False)
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = pooler_type
    ours = DeformROIHeads(cfg, SHAPES).box_pooler
    theirs = StandardROIHeads(cfg, SHAPES).box_pooler
    if pooler_type != "ROIAlignV2":
        assert type(ours) is ROIPooler
    features, boxes = torch.randn(1, 8, 9, 11), torch.tensor([[3.0, 5, 100, 70], [8, 2, 99, 130]])
    torch.testing.assert_close(
        ours([features], [Boxes(boxes)]), theirs([features], [Boxes(boxes)]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("keys", [{"DEFORM": True}, {"POOLER_MODE": "bin"}])
def test_a_type_that_cannot_deform_is_refused(keys: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"POOLER_TYPE must be ROIAlignV2 .* got .* ROIPo"):
        make_heads(POOLER_TYPE="ROIPool", **keys)
