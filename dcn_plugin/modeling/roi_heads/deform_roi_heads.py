# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The heads of Faster R-CNN, on average RoI pooling, plain or deformable."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes

from ..config_checks import check_features
from ..poolers import AverageROIPooler, DeformROIPooler


@ROI_HEADS_REGISTRY.register()
class DeformROIHeads(StandardROIHeads):
    """Detectron2's `StandardROIHeads` with the paper's pooling of boxes (section 2.2).

    With MODEL.ROI_BOX_HEAD.DEFORM the bins move. Everything else, masks and keypoints too, is as
    in `StandardROIHeads`.
    """

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        check_features("MODEL.ROI_HEADS.IN_FEATURES", names, input_shape, False)
        parts = super()._init_box_head(cfg, input_shape)
        return {**parts, "box_pooler": build_box_pooler(cfg, input_shape)}

    def predict_regions(
        self, features: dict[str, Tensor], boxes: list[Boxes]
    ) -> tuple[Tensor, Tensor]:
        """Predicts classes and refined boxes of regions.

        Args:
            features: Tensor[N, C, H, W] by name.
            boxes: of each image.

        Returns:
            what `box_predictor` predicts.
        """
        pooled = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        return self.box_predictor(self.box_head(pooled))


def build_box_pooler(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> ROIPooler:
    """Builds the pooler of the box head.

    Args:
        cfg: with POOLER_RESOLUTION, POOLER_SAMPLING_RATIO, POOLER_MODE, DEFORM and DEFORM_GAMMA
            of MODEL.ROI_BOX_HEAD.
        input_shape: of the backbone's features.

    Returns:
        a pooler of MODEL.ROI_HEADS.IN_FEATURES.
    """
    head = cfg.MODEL.ROI_BOX_HEAD
    names = cfg.MODEL.ROI_HEADS.IN_FEATURES
    shared = {
        "output_size": head.POOLER_RESOLUTION,
        "scales": tuple(1.0 / input_shape[name].stride for name in names),
        "sampling_ratio": head.POOLER_SAMPLING_RATIO,
        "mode": head.POOLER_MODE,
    }
    if not head.DEFORM:
        return AverageROIPooler(**shared)
    return DeformROIPooler(input_shape[names[0]].channels, gamma=head.DEFORM_GAMMA, **shared)
