# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The heads of R-FCN: position-sensitive score maps and a vote, plain or deformable."""

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

from ..config_checks import check_features, check_only_boxes
from .boxes_only import BoxesOnly
from .ohem import find_hardest


class RFCNOutputLayers(FastRCNNOutputLayers):
    """Predicts classes and boxes of RoIs by the vote of their bins.

    Losses and inference are those of `FastRCNNOutputLayers`; in the place of its two
    fully connected layers are two position-sensitive poolings. Boxes are class-agnostic.
    """

    @configurable
    def __init__(self, *, cls_score: nn.Module, bbox_pred: nn.Module, **settings: Any) -> None:
        """Takes the poolings.

        Args:
            cls_score: pools C+1 classes, background last.
            bbox_pred: pools the four deltas of a box.
            settings: of `FastRCNNOutputLayers`.
        """
        super().__init__(ShapeSpec(channels=1), cls_agnostic_bbox_reg=True, **settings)
        self.cls_score = cls_score
        self.bbox_pred = bbox_pred

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Reads a config.

        Args:
            cfg: with MODEL.ROI_BOX_HEAD's POOLER_RESOLUTION (k), POOLER_SAMPLING_RATIO,
                POOLER_MODE, DEFORM and DEFORM_GAMMA.
            input_shape: of the features.
        """
        settings = super().from_config(cfg, input_shape)
        for replaced in ("input_shape", "cls_agnostic_bbox_reg"):
            del settings[replaced]
        classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1
        return {
            **settings,
            # Offsets for each class, background too; one set for the boxes.
            "cls_score": build_ps_pool(cfg, input_shape, classes, offset_classes=classes),
            "bbox_pred": build_ps_pool(cfg, input_shape, 4, offset_classes=1),
        }

    def forward(self, features: Tensor, boxes: list[Boxes]) -> tuple[Tensor, Tensor]:
        """Predicts.

        Args:
            features: Tensor[N, C, H, W].
            boxes: of each image.

        Returns:
            logits Tensor[R, C+1] and deltas Tensor[R, 4].
        """
        tensors = [b.tensor for b in boxes]
        scores = self.cls_score(features, tensors).mean(dim=(2, 3))
        return scores, self.bbox_pred(features, tensors).mean(dim=(2, 3))


@ROI_HEADS_REGISTRY.register()
class RFCNROIHeads(BoxesOnly, ROIHeads):
    """The heads of R-FCN, which learn from the hardest RoIs of each image."""

    @configurable
    def __init__(
        self, *, in_feature: str, box_predictor: nn.Module, hardest: int, **settings: Any
    ) -> None:
        """Takes the parts.

        Args:
            in_feature: what score maps are made of.
            box_predictor: `RFCNOutputLayers`.
            hardest: how many RoIs of an image are learnt from; 0: as many as Detectron2 samples.
            settings: of `ROIHeads`.
        """
        super().__init__(**settings)
        self.in_feature = in_feature
        self.box_predictor = box_predictor
        self.hardest = hardest

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads a config.

        Args:
            cfg: with MODEL.ROI_HEADS.OHEM and the keys of `RFCNOutputLayers`.
            input_shape: of the backbone's features.
        """
        cfg = with_dcn_defaults(cfg)
        heads = cfg.MODEL.ROI_HEADS
        check_only_boxes(cfg, cls.__name__)
        check_features("MODEL.ROI_HEADS.IN_FEATURES", heads.IN_FEATURES, input_shape, True)
        if heads.OHEM < 0:
            raise ValueError(
                "MODEL.ROI_HEADS.OHEM must be a number of RoIs, or 0 for Detectron2's sampler, "
                f"got {heads.OHEM}"
            )
        if heads.OHEM and cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE != "smooth_l1":
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE must be smooth_l1 with OHEM, got "
                f"{cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE}"
            )
        settings = super().from_config(cfg)
        if heads.OHEM:  # all RoIs are labelled, and those to learn from chosen by their losses
            settings |= {"batch_size_per_image": sys.maxsize, "positive_fraction": 1.0}
        (in_feature,) = heads.IN_FEATURES
        return {
            **settings,
            "in_feature": in_feature,
            "box_predictor": RFCNOutputLayers(cfg, input_shape[in_feature]),
            "hardest": heads.OHEM,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Does what `ROIHeads.forward` says.

        Args:
            images: not needed.
            features: Tensor[N, C, H, W] by name.
            proposals: of each image.
            targets: the truth of each image, in training.

        Returns:
            what was detected, and no losses; in training the proposals learnt from, and losses.
        """
        if self.training:
            proposals = self.label_and_sample_proposals(proposals, targets)
        predictions = self.predict_regions(features, [p.proposal_boxes for p in proposals])
        if not self.training:
            return self.box_predictor.inference(predictions, proposals)[0], {}
        if self.hardest:
            predictions, proposals = self._keep_hardest(predictions, proposals)
        return proposals, self.box_predictor.losses(predictions, proposals)

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
        return self.box_predictor(features[self.in_feature], boxes)

    def _keep_hardest(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> tuple[tuple[Tensor, Tensor], list[Instances]]:
        kept = find_hardest(self.box_predictor, predictions, proposals, self.hardest)
        sizes = [len(p) for p in proposals]
        logits, deltas = (
            [part[keep] for part, keep in zip(p.split(sizes), kept, strict=True)]
            for p in predictions
        )
        chosen = [p[keep] for p, keep in zip(proposals, kept, strict=True)]
        return (torch.cat(logits), torch.cat(deltas)), chosen


def build_ps_pool(
    cfg: CfgNode, input_shape: ShapeSpec, out_channels: int, offset_classes: int
) -> PSRoIPool:
    """Builds a position-sensitive pooling, deformable if the config says so.

    Args:
        cfg: as in `RFCNOutputLayers`.
        input_shape: of the features.
        out_channels: of the result.
        offset_classes: how many blocks of them have offsets of their own, if deformable.
    """
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
