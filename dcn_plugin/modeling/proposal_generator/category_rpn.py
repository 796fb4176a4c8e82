# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The region proposal network with classes (section 2.3)."""

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

from ..config_checks import check_class, check_features

"""
Shape shorthand in this module:

    N: images, C: classes without background, A: anchors to a cell, R: anchors of an image
"""


@RPN_HEAD_REGISTRY.register()
class CategoryRPNHead(StandardRPNHead):
    """Detectron2's head of an RPN, with logits of every class and background for each anchor."""

    @configurable
    def __init__(self, *, num_classes: int, num_anchors: int, **settings: Any) -> None:
        """Makes the head.

        Args:
            num_classes: C.
            num_anchors: A.
            settings: of `StandardRPNHead`.
        """
        super().__init__(num_anchors=num_anchors, **settings)
        logits = self.objectness_logits
        # Channel a * (C + 1) + c has class c of anchor a, background last.
        self.objectness_logits = nn.Conv2d(logits.in_channels, num_anchors * (num_classes + 1), 1)
        nn.init.normal_(self.objectness_logits.weight, std=0.01)
        nn.init.zeros_(self.objectness_logits.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Reads a config.

        Args:
            cfg: with MODEL.ROI_HEADS.NUM_CLASSES, and what `StandardRPNHead` reads.
            input_shape: of the features.
        """
        network = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
        name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
        generator = getattr(network, "generator", None) or PROPOSAL_GENERATOR_REGISTRY.get(name)
        if not issubclass(generator, CategoryRPN):
            raise ValueError(
                f"MODEL.PROPOSAL_GENERATOR.NAME must be CategoryRPN with {cls.__name__}, got {name}"
            )
        settings = super().from_config(cfg, input_shape)
        return {**settings, "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}


@PROPOSAL_GENERATOR_REGISTRY.register()
class CategoryRPN(RPN):
    """Detectron2's RPN, which learns the classes of its anchors.

    Anchors are matched and sampled as there; each is classified by a softmax over the classes and
    background. Proposals are the boxes least likely to be background.
    """

    @configurable
    def __init__(self, *, num_classes: int, **settings: Any) -> None:
        """Makes the generator.

        Args:
            num_classes: C.
            settings: of `RPN`; its head is a `CategoryRPNHead`.
        """
        super().__init__(**settings)
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads a config.

        Args:
            cfg: with what `RPN` and `CategoryRPNHead` read.
            input_shape: of the backbone's features.
        """
        name, heads = cfg.MODEL.RPN.HEAD_NAME, RPN_HEAD_REGISTRY
        check_class("MODEL.RPN.HEAD_NAME", name, heads, CategoryRPNHead, cls.__name__)
        check_features("MODEL.RPN.IN_FEATURES", cfg.MODEL.RPN.IN_FEATURES, input_shape, False)
        settings = super().from_config(cfg, input_shape)
        return {**settings, "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels anchors with classes.

        Args:
            anchors: of each level.
            gt_instances: the truth of each image.

        Returns:
            for each image Tensor[R] of classes, C for background and -1 for anchors that were not
            sampled; and Tensor[R, 4], the boxes of the truth.
        """
        labels, boxes = super().label_and_sample_anchors(anchors, gt_instances)
        together = Boxes.cat(anchors)
        classes = []
        for label, truth in zip(labels, gt_instances, strict=True):
            found = torch.where(label == 0, self.num_classes, -1)
            objects = label == 1
            if objects.any():
                # Of the few that were sampled: the whole matrix may not fit twice.
                _, matched = pairwise_iou(truth.gt_boxes, together[objects]).max(dim=0)
                found[objects] = truth.gt_classes[matched]
            classes.append(found)
        return classes, boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Computes the losses of classes and boxes, over all sampled anchors.

        Args:
            anchors: of each level.
            pred_objectness_logits: Tensor[N, R * (C+1)] of each level.
            gt_labels: what `label_and_sample_anchors` returned, like the last.
            pred_anchor_deltas: Tensor[N, R, 4] of each level.
            gt_boxes: of each image.

        Returns:
            `loss_rpn_cls` and `loss_rpn_loc`.
        """
        labels = torch.stack(gt_labels)
        sampled = labels >= 0
        objects = sampled & (labels < self.num_classes)
        storage = get_event_storage()
        count = int(objects.sum())
        storage.put_scalar("rpn/num_pos_anchors", count / len(labels))
        storage.put_scalar("rpn/num_neg_anchors", (int(sampled.sum()) - count) / len(labels))
        logits = cat([self.by_anchor(level) for level in pred_objectness_logits], dim=1)
        of_classes = F.cross_entropy(logits[sampled].float(), labels[sampled], reduction="sum")
        of_boxes = _dense_box_regression_loss(
            anchors,
            self.box2box_transform,
            pred_anchor_deltas,
            gt_boxes,
            objects,
            box_reg_loss_type=self.box_reg_loss_type,
            smooth_l1_beta=self.smooth_l1_beta,
        )
        found = {"loss_rpn_cls": of_classes, "loss_rpn_loc": of_boxes}
        anchors_learnt = self.batch_size_per_image * len(labels)
        return {k: v / anchors_learnt * self.loss_weight.get(k, 1.0) for k, v in found.items()}

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Finds the boxes least likely to be background.

        Args:
            anchors: of each level.
            pred_objectness_logits: Tensor[N, R * (C+1)] of each level.
            pred_anchor_deltas: Tensor[N, R, 4] of each level.
            image_sizes: of each image.

        Returns:
            `proposal_boxes` and `objectness_logits` of each image.
        """
        objectness = []
        for level in pred_objectness_logits:
            logits = self.by_anchor(level.detach()).float()
            # The logit of not being background, whose sigmoid is the sum over all classes.
            objectness.append(logits[..., :-1].logsumexp(dim=-1) - logits[..., -1])
        return super().predict_proposals(anchors, objectness, pred_anchor_deltas, image_sizes)

    def by_anchor(self, logits: Tensor) -> Tensor:
        """Returns Tensor[N, R, C+1] of the logits of a level as `RPN.forward` flattens them."""
        return logits.unflatten(1, (-1, self.num_classes + 1))
