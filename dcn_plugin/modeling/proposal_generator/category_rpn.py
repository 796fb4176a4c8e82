# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The category-aware region proposal network (section 2.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.proposal_generator import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN,
    RPN_HEAD_REGISTRY,
)
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage

from dcn_plugin.messages import UserError

from ..model_config_checks import check_features

"""
Shape shorthand in this module:

    N: images, C: classes without background, A: anchors per cell, R: anchors per image
"""


@RPN_HEAD_REGISTRY.register()
class CategoryRPNHead(StandardRPNHead):
    """`StandardRPNHead` with C+1 logits for each anchor."""

    @configurable
    def __init__(self, *, num_classes: int, num_anchors: int, **settings: Any) -> None:
        """Makes the head.

        Args:
            num_classes: C.
            num_anchors: A.
            settings: further arguments of `StandardRPNHead`.
        """
        super().__init__(num_anchors=num_anchors, **settings)
        logits = self.objectness_logits
        # Channel a * (C+1) + c is class c of anchor a; background is the last class.
        self.objectness_logits = nn.Conv2d(logits.in_channels, num_anchors * (num_classes + 1), 1)
        nn.init.normal_(self.objectness_logits.weight, std=0.01)
        nn.init.zeros_(self.objectness_logits.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Reads MODEL.ROI_HEADS.NUM_CLASSES and the keys of `StandardRPNHead`.

        Args:
            cfg: the config.
            input_shape: shapes of the features.
        """
        network = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
        generator = getattr(network, "generator", None) or PROPOSAL_GENERATOR_REGISTRY.get(name)
        if not issubclass(generator, CategoryRPN):
            raise UserError(
                f"MODEL.PROPOSAL_GENERATOR.NAME must be CategoryRPN with {cls.__name__}, got {name}"
            )
        settings = super().from_config(cfg, input_shape)
        return {**settings, "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}


@PROPOSAL_GENERATOR_REGISTRY.register()
class CategoryRPN(RPN):
    """Detectron2's `RPN` with a softmax over the classes and background for each anchor.

    Anchors are matched and sampled as in `RPN`. Proposals are the boxes with the lowest probability
    of background.
    """

    @configurable
    def __init__(self, *, num_classes: int, **settings: Any) -> None:
        """Makes the generator.

        Args:
            num_classes: C.
            settings: arguments of `RPN`; the head must be a `CategoryRPNHead`.
        """
        super().__init__(**settings)
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads MODEL.ROI_HEADS.NUM_CLASSES and the keys of `RPN`.

        Args:
            cfg: the config.
            input_shape: shapes of the backbone's features.
        """
        head = cfg.MODEL.RPN.HEAD_NAME
        if not issubclass(RPN_HEAD_REGISTRY.get(head), CategoryRPNHead):
            raise UserError(
                f"MODEL.RPN.HEAD_NAME must be CategoryRPNHead for {cls.__name__}, got {head}"
            )
        check_features("MODEL.RPN.IN_FEATURES", cfg.MODEL.RPN.IN_FEATURES, input_shape, False)
        settings = super().from_config(cfg, input_shape)
        return {**settings, "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Samples anchors and labels them with classes.

        Args:
            anchors: anchors of each level.
            gt_instances: ground truth of each image.

        Returns:
            for each image the classes Tensor[R], C for background and -1 for anchors that are not
            sampled; and the matched ground-truth boxes Tensor[R, 4].
        """
        labels, matched_gt_boxes = super().label_and_sample_anchors(anchors, gt_instances)
        all_anchors = Boxes.cat(anchors)
        gt_classes = []
        for label, gt in zip(labels, gt_instances, strict=True):
            classes = torch.where(label == 0, self.num_classes, -1)
            fg_mask = label == 1
            if fg_mask.any():
                # Only of the sampled anchors: the IoU matrix of all may not fit in memory twice.
                _, matched_idxs = pairwise_iou(gt.gt_boxes, all_anchors[fg_mask]).max(dim=0)
                classes[fg_mask] = gt.gt_classes[matched_idxs]
            gt_classes.append(classes)
        return gt_classes, matched_gt_boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Computes the classification and box losses of the sampled anchors.

        Args:
            anchors: anchors of each level.
            pred_objectness_logits: logits of each level, Tensor[N, R * (C+1)].
            gt_labels: classes of the anchors in each image, from `label_and_sample_anchors`.
            pred_anchor_deltas: deltas of each level, Tensor[N, R, 4].
            gt_boxes: matched boxes of the anchors in each image.

        Returns:
            `loss_rpn_cls` and `loss_rpn_loc`.
        """
        labels = torch.stack(gt_labels)
        sampled = labels >= 0
        fg_mask = sampled & (labels < self.num_classes)
        storage = get_event_storage()
        num_fg = int(fg_mask.sum())
        storage.put_scalar("rpn/num_pos_anchors", num_fg / len(labels))
        storage.put_scalar("rpn/num_neg_anchors", (int(sampled.sum()) - num_fg) / len(labels))
        logits = cat([self.by_anchor(level) for level in pred_objectness_logits], dim=1)
        loss_cls = F.cross_entropy(logits[sampled].float(), labels[sampled], reduction="sum")
        loss_loc = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            fg_mask,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        losses = {"loss_rpn_cls": loss_cls, "loss_rpn_loc": loss_loc}
        normalizer = self.batch_size_per_image * len(labels)
        return {k: v / normalizer * self.loss_weight.get(k, 1.0) for k, v in losses.items()}

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Selects the boxes with the lowest probability of background.

        Args:
            anchors: anchors of each level.
            pred_objectness_logits: logits of each level, Tensor[N, R * (C+1)].
            pred_anchor_deltas: deltas of each level, Tensor[N, R, 4].
            image_sizes: (height, width) of each image.

        Returns:
            `proposal_boxes` and `objectness_logits` of each image.
        """
        objectness = []
        for level in pred_objectness_logits:
            logits = self.by_anchor(level.detach()).float()
            # The logit of foreground: its sigmoid is the sum of the softmax over all classes.
            objectness.append(logits[..., :-1].logsumexp(dim=-1) - logits[..., -1])
        return super().predict_proposals(anchors, objectness, pred_anchor_deltas, image_sizes)

    def by_anchor(self, logits: Tensor) -> Tensor:
        """Reshapes the logits of a level from `RPN.forward`, (N, R * (C+1)) -> (N, R, C+1)."""
        return logits.unflatten(1, (-1, self.num_classes + 1))
