# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The category-aware RPN as a one-stage detector (section 2.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, cat
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage

from .category_rpn import CategoryRPN

"""
Shape shorthand in this module:

    N: images, C: classes without background, R: anchors per image
"""


@PROPOSAL_GENERATOR_REGISTRY.register()
class CategoryDetector(CategoryRPN):
    """A `CategoryRPN` that returns detections at inference."""

    @configurable
    def __init__(
        self,
        *,
        score_thresh: float,
        detection_nms_thresh: float,
        detections_per_image: int,
        vis_period: int,
        **settings: Any,
    ) -> None:
        """Makes the detector.

        Args:
            score_thresh: minimum score of a detection.
            detection_nms_thresh: IoU threshold of the non-maximum suppression of each class.
            detections_per_image: maximum number of detections.
            vis_period: iterations between two visualizations of proposals in training; 0: none.
            settings: arguments of `CategoryRPN`.
        """
        super().__init__(**settings)
        self.score_thresh = score_thresh
        self.detection_nms_thresh = detection_nms_thresh
        self.detections_per_image = detections_per_image
        self.vis_period = vis_period

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads a config.

        Args:
            cfg: MODEL.ROI_HEADS.SCORE_THRESH_TEST and NMS_THRESH_TEST, TEST.DETECTIONS_PER_IMAGE,
                VIS_PERIOD, and the keys of `CategoryRPN`.
            input_shape: shapes of the backbone's features.
        """
        return {
            **super().from_config(cfg, input_shape),
            "score_thresh": cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            "detection_nms_thresh": cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "vis_period": cfg.VIS_PERIOD,
        }

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """Computes the detections, or in training the proposals if they are to be visualized.

        Args:
            anchors: anchors of each level.
            pred_objectness_logits: logits of each level, Tensor[N, R * (C+1)].
            pred_anchor_deltas: deltas of each level, Tensor[N, R, 4].
            image_sizes: (height, width) of each image.

        Returns:
            `pred_boxes`, `scores` and `pred_classes` of each image; in training the proposals of
            `CategoryRPN`, or none.
        """
        if self.training:
            if self.vis_period > 0 and get_event_storage().iter % self.vis_period == 0:
                return super().predict_proposals(
                    anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
                )
            if not all(x.isfinite().all() for x in pred_objectness_logits + pred_anchor_deltas):
                raise FloatingPointError(  # as in Detectron2's find_top_rpn_proposals
                    "Predicted boxes or scores contain Inf/NaN. Training has diverged."
                )
            empty = pred_anchor_deltas[0].new_zeros(0, 4)
            return [
                Instances(size, proposal_boxes=Boxes(empty), objectness_logits=empty[:, 0])
                for size in image_sizes
            ]
        probabilities = [
            self.by_anchor(logits).float().softmax(dim=-1) for logits in pred_objectness_logits
        ]
        decoded = self._decode_proposals(anchors, pred_anchor_deltas)
        boxes, scores = [], []
        for image, size in enumerate(image_sizes):
            levels = [
                self._top_boxes(level[image], probs[image], size)
                for level, probs in zip(decoded, probabilities, strict=True)
            ]
            boxes.append(cat([level[0] for level in levels]))
            scores.append(cat([level[1] for level in levels]))
        detections, _ = fast_rcnn_inference(
            boxes,
            scores,
            image_sizes,
            self.score_thresh,
            self.detection_nms_thresh,
            self.detections_per_image,
        )
        return detections

    def _top_boxes(
        self, boxes: Tensor, probabilities: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Returns the `pre_nms_topk` boxes and probabilities of a level with the best class.

        Args:
            boxes: Tensor[R, 4].
            probabilities: Tensor[R, C+1].
            size: (height, width) of the image.
        """
        finite = boxes.isfinite().all(dim=1) & probabilities.isfinite().all(dim=1)
        inside, probabilities = Boxes(boxes[finite]), probabilities[finite]
        inside.clip(size)
        kept = inside.nonempty(threshold=self.min_box_size)
        boxes, probabilities = inside.tensor[kept], probabilities[kept]
        count = boxes.shape[0]
        if isinstance(count, Tensor):  # in tracing
            count = count.clamp(max=self.pre_nms_topk[False])
        else:
            count = min(count, self.pre_nms_topk[False])
        best = probabilities[:, :-1].amax(dim=1).topk(count).indices
        return boxes[best], probabilities[best]
