# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The region proposal network with classes, and the detector that it is (section 2.3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.box_regression import _dense_box_regression_loss
from detectron2.modeling.proposal_generator import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN,
    RPN_HEAD_REGISTRY,
)
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage

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
        if CategoryRPNHead.__name__ != cfg.MODEL.RPN.HEAD_NAME:
            raise ValueError(
                f"MODEL.RPN.HEAD_NAME must be {CategoryRPNHead.__name__} with {cls.__name__}, got "
                f"{cfg.MODEL.RPN.HEAD_NAME}"
            )
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
                matched, _ = self.anchor_matcher(pairwise_iou(truth.gt_boxes, together))
                found[objects] = truth.gt_classes[matched[objects]]
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
            logits = self.by_anchor(level).float()
            # The logit of not being background, whose sigmoid is the sum over all classes.
            objectness.append(logits[..., :-1].logsumexp(dim=-1) - logits[..., -1])
        return super().predict_proposals(anchors, objectness, pred_anchor_deltas, image_sizes)

    def by_anchor(self, logits: Tensor) -> Tensor:
        """Returns Tensor[N, R, C+1] of the logits of a level as `RPN.forward` flattens them."""
        return logits.unflatten(1, (-1, self.num_classes + 1))


@PROPOSAL_GENERATOR_REGISTRY.register()
class CategoryDetector(CategoryRPN):
    """A `CategoryRPN` whose proposals, when it is not training, are detections."""

    @configurable
    def __init__(
        self,
        *,
        score_thresh: float,
        detection_nms_thresh: float,
        detections_per_image: int,
        **settings: Any,
    ) -> None:
        """Makes the detector.

        Args:
            score_thresh: detections have a higher score.
            detection_nms_thresh: IoU of detections of a class, of which one is left.
            detections_per_image: at most so many.
            settings: of `CategoryRPN`.
        """
        super().__init__(**settings)
        self.score_thresh = score_thresh
        self.detection_nms_thresh = detection_nms_thresh
        self.detections_per_image = detections_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads a config.

        Args:
            cfg: with MODEL.ROI_HEADS.SCORE_THRESH_TEST and NMS_THRESH_TEST,
                TEST.DETECTIONS_PER_IMAGE, and what `CategoryRPN` reads.
            input_shape: of the backbone's features.
        """
        return {
            **super().from_config(cfg, input_shape),
            "score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "detection_nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Finds proposals in training, and detections otherwise.

        Args:
            anchors: of each level.
            pred_objectness_logits: Tensor[N, R * (C+1)] of each level.
            pred_anchor_deltas: Tensor[N, R, 4] of each level.
            image_sizes: of each image.

        Returns:
            `pred_boxes`, `scores` and `pred_classes` of each image; in training as `CategoryRPN`.
        """
        if self.training:
            return super().predict_proposals(
                anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
            )
        boxes, scores = [], []
        decoded = self._decode_proposals(anchors, pred_anchor_deltas)
        for level, logits in zip(decoded, pred_objectness_logits, strict=True):
            probabilities = self.by_anchor(logits).float().softmax(dim=-1)
            # As many as an RPN looks at, so that not all of R * C boxes come to be compared.
            count = level.shape[1]
            if isinstance(count, Tensor):  # in tracing
                count = count.clamp(max=self.pre_nms_topk[False])
            else:
                count = min(count, self.pre_nms_topk[False])
            best = probabilities[..., :-1].amax(dim=-1).topk(count, dim=1).indices[..., None]
            boxes.append(level.take_along_dim(best, dim=1))
            scores.append(probabilities.take_along_dim(best, dim=1))
        found, _ = fast_rcnn_inference(
            list(cat(boxes, dim=1)),
            list(cat(scores, dim=1)),
            image_sizes,
            self.score_thresh,
            self.detection_nms_thresh,
            self.detections_per_image,
        )
        return found
