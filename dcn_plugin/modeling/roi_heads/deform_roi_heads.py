# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI heads of Faster R-CNN with deformable RoI pooling."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes

from dcn_plugin.config import with_dcn_defaults
from dcn_plugin.messages import UserError

from ..model_config_checks import check_features
from ..poolers import AverageROIPooler, DeformROIPooler


@ROI_HEADS_REGISTRY.register()
class DeformROIHeads(StandardROIHeads):
    """Detectron2's `StandardROIHeads` with average or deformable RoI pooling of boxes.

    MODEL.ROI_BOX_HEAD.DEFORM makes the pooling deformable (section 2.2). Masks and keypoints are
    pooled as in `StandardROIHeads`.
    """

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        cfg = with_dcn_defaults(cfg)
        names = cfg.MODEL.ROI_HEADS.IN_FEATURES
        check_features("MODEL.ROI_HEADS.IN_FEATURES", names, input_shape, False)
        box_head = super()._init_box_head(cfg, input_shape)
        return {**box_head, "box_pooler": _build_box_pooler(cfg, input_shape, **box_head)}

    def predict_regions(
        self, features: dict[str, Tensor], boxes: list[Boxes]
    ) -> tuple[Tensor, Tensor]:
        """Predicts classes and refined boxes of regions.

        Args:
            features: feature maps by name, Tensor[N, C, H, W].
            boxes: regions of each image.

        Returns:
            the predictions of `box_predictor`.
        """
        pooled = self.box_pooler([features[name] for name in self.box_in_features], boxes)
        return self.box_predictor(self.box_head(pooled))


def _build_box_pooler(
    cfg: CfgNode, input_shape: dict[str, ShapeSpec], box_pooler: ROIPooler, **_: Any
) -> ROIPooler:
    """Returns the pooler of the box head; `box_pooler` is the one that Detectron2 built."""
    head = cfg.MODEL.ROI_BOX_HEAD
    if head.POOLER_TYPE != "ROIAlignV2":
        if head.DEFORM or head.POOLER_MODE != "align":
            raise UserError(
                "MODEL.ROI_BOX_HEAD.POOLER_TYPE must be ROIAlignV2 with DEFORM True or with a "
                f"POOLER_MODE other than align, got POOLER_TYPE {head.POOLER_TYPE}, DEFORM "
                f"{head.DEFORM} and POOLER_MODE {head.POOLER_MODE}"
            )
        return box_pooler
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
