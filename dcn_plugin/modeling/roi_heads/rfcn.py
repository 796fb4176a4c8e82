# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI heads of R-FCN: position-sensitive RoI pooling, plain or deformable."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances

from dcn_plugin.config import with_dcn_defaults
from dcn_plugin.layers import DeformPSRoIPool, PSRoIPool
from dcn_plugin.messages import UserError

from ..model_config_checks import check_features, check_only_boxes
from .ohem import select_hard_rois


class RFCNOutputLayers(FastRCNNOutputLayers):
    """`FastRCNNOutputLayers` with position-sensitive RoI pooling instead of linear layers.

    Logits and deltas of a RoI are the means over its bins. Boxes are class-agnostic.
    """

    @configurable
    def __init__(self, *, cls_score: nn.Module, bbox_pred: nn.Module, **settings: Any) -> None:
        """Stores the two pooling layers.

        Args:
            cls_score: pools the score maps of C+1 classes, background last.
            bbox_pred: pools the maps of the four box deltas.
            settings: arguments of `FastRCNNOutputLayers`.
        """
        super().__init__(ShapeSpec(channels=1), cls_agnostic_bbox_reg=True, **settings)
        self.cls_score = cls_score
        self.bbox_pred = bbox_pred

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Reads POOLER_RESOLUTION (k), POOLER_SAMPLING_RATIO, POOLER_MODE, DEFORM, DEFORM_GAMMA.

        Args:
            cfg: the config; the keys are below MODEL.ROI_BOX_HEAD.
            input_shape: shape of the features.
        """
        settings = super().from_config(cfg, input_shape)
        for replaced in ("input_shape", "cls_agnostic_bbox_reg"):
            del settings[replaced]
        classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1
        return {
            **settings,
            # Each class, including background, has its own offsets; the boxes share one set.
            "cls_score": _build_ps_pool(cfg, input_shape, classes, offset_classes=classes),
            "bbox_pred": _build_ps_pool(cfg, input_shape, 4, offset_classes=1),
        }

    def forward(self, features: Tensor, boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        """Predicts classes and boxes.

        Args:
            features: Tensor[N, C, H, W].
            boxes: RoIs of each image.

        Returns:
            logits Tensor[R, C+1] and deltas Tensor[R, 4].
        """
        tensors = [b.tensor for b in boxes]
        scores = self.cls_score(features, tensors).mean(dim=(2, 3))
        return scores, self.bbox_pred(features, tensors).mean(dim=(2, 3))


@ROI_HEADS_REGISTRY.register()
class RFCNROIHeads(ROIHeads):
    """RoI heads of R-FCN, trained by online hard example mining (OHEM)."""

    @configurable
    def __init__(
        self, *, in_feature: str, box_predictor: nn.Module, ohem_batch_size: int, **settings: Any
    ) -> None:
        """Stores the box predictor.

        Args:
            in_feature: name of the input feature.
            box_predictor: an `RFCNOutputLayers`.
            ohem_batch_size: number of RoIs per image, those with the highest losses, on which the
                losses are computed; 0: on those that Detectron2 samples.
            settings: arguments of `ROIHeads`.
        """
        super().__init__(**settings)
        self.in_feature = in_feature
        self.box_predictor = box_predictor
        self.ohem_batch_size = ohem_batch_size

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads MODEL.ROI_HEADS.OHEM and the keys of `RFCNOutputLayers`.

        Args:
            cfg: the config.
            input_shape: shapes of the backbone's features.
        """
        cfg = with_dcn_defaults(cfg)
        heads = cfg.MODEL.ROI_HEADS
        check_only_boxes(cfg, cls.__name__)
        check_features("MODEL.ROI_HEADS.IN_FEATURES", heads.IN_FEATURES, input_shape, True)
        if heads.OHEM < 0:
            raise UserError(
                "MODEL.ROI_HEADS.OHEM must be a number of RoIs, or 0 for Detectron2's sampler, "
                f"got {heads.OHEM}"
            )
        if heads.OHEM and cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE != "smooth_l1":
            raise UserError(
                "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE must be smooth_l1 if MODEL.ROI_HEADS.OHEM "
                f"is not 0, got {cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE}"
            )
        settings = super().from_config(cfg)
        if heads.OHEM:  # label all RoIs; forward() selects those with the highest losses
            settings |= {"batch_size_per_image": sys.maxsize, "positive_fraction": 1.0}
        (in_feature,) = heads.IN_FEATURES
        return {
            **settings,
            "in_feature": in_feature,
            "box_predictor": RFCNOutputLayers(cfg, input_shape[in_feature]),
            "ohem_batch_size": heads.OHEM,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Implements `ROIHeads.forward`.

        Args:
            images: not used.
            features: feature maps by name, Tensor[N, C, H, W].
            proposals: proposals of each image.
            targets: ground truth of each image, in training.

        Returns:
            detections and no losses; in training the sampled proposals and the losses.
        """
        if self.training:
            proposals = self.label_and_sample_proposals(proposals, targets)
        predictions = self.predict_regions(features, [p.proposal_boxes for p in proposals])
        if not self.training:
            return self.box_predictor.inference(predictions, proposals)[0], {}
        if self.ohem_batch_size:
            predictions, proposals = self._select_hard_rois(predictions, proposals)
        return proposals, self.box_predictor.losses(predictions, proposals)

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
        return self.box_predictor(features[self.in_feature], boxes)

    def _select_hard_rois(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[tuple[Tensor, Tensor], list[Instances]]:
        """Returns the predictions and proposals of the RoIs with the highest losses."""
        kept = select_hard_rois(self.box_predictor, predictions, proposals, self.ohem_batch_size)
        sizes = [len(p) for p in proposals]
        logits, deltas = (
            [part[keep] for part, keep in zip(p.split(sizes), kept, strict=True)]
            for p in predictions
        )
        chosen = [p[keep] for p, keep in zip(proposals, kept, strict=True)]
        return (torch.cat(logits), torch.cat(deltas)), chosen


def _build_ps_pool(
    cfg: CfgNode, input_shape: ShapeSpec, out_channels: int, offset_classes: int
) -> PSRoIPool:
    """Builds position-sensitive RoI pooling; `offset_classes` blocks of channels have offsets."""
    head = cfg.MODEL.ROI_BOX_HEAD
    shared = {
        "in_channels": input_shape.channels,
        "out_channels": out_channels,
        "output_size": head.POOLER_RESOLUTION,
        "spatial_scale": 1.0 / input_shape.stride,
        "sampling_ratio": head.POOLER_SAMPLING_RATIO,
        "mode": head.POOLER_MODE,
    }
    if not head.DEFORM:
        return PSRoIPool(**shared)
    return DeformPSRoIPool(**shared, gamma=head.DEFORM_GAMMA, classes=offset_classes)
