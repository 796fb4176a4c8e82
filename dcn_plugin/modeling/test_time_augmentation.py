# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Test-time augmentation and iterative bounding-box averaging (section 4.3)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.config import CfgNode
from detectron2.modeling import (
    DatasetMapperTTA,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
    PanopticFPN,
    SemanticSegmentor,
)
from detectron2.modeling.roi_heads.fast_rcnn import fast_rcnn_inference_single_image
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.transforms import HFlipTransform

from dcn_plugin.config import with_dcn_defaults
from dcn_plugin.layers.offset_branch import without_autocast
from dcn_plugin.messages import UserError


def build_model_with_tta(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Wraps a trained model for test-time augmentation and box averaging.

    Args:
        cfg: the config, with TEST.AUG and TEST.BOX_AVERAGING.
        model: a `GeneralizedRCNN` or a `SemanticSegmentor`.

    Returns:
        a module with the inputs and outputs of the model.

    Raises:
        ValueError: if the model does not support what the config asks for.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    cfg = with_dcn_defaults(cfg)
    if isinstance(model, PanopticFPN):  # a GeneralizedRCNN with another inference()
        raise UserError(
            "TEST.AUG.ENABLED and TEST.BOX_AVERAGING.ENABLED must be False for a "
            f"{type(model).__name__}, which Detectron2's GeneralizedRCNNWithTTA does not support"
        )
    wrapper_class: type[nn.Module] = GeneralizedRCNNWithTTA
    if cfg.TEST.BOX_AVERAGING.ENABLED:
        if not hasattr(getattr(model, "roi_heads", None), "predict_regions"):
            raise UserError(
                "TEST.BOX_AVERAGING.ENABLED must be False for a model without DeformROIHeads or "
                f"RFCNROIHeads, which score boxes again; this is a {type(model).__name__}"
            )
        wrapper_class = BoxAveragingRCNN
    elif isinstance(model, SemanticSegmentor):
        wrapper_class = SemanticSegmentorWithTTA
    try:
        wrapper = wrapper_class(cfg, model)
    except AssertionError as error:  # how GeneralizedRCNNWithTTA refuses models and keys
        raise UserError(f"TEST.AUG.ENABLED must be False: {error}") from error
    # `inference_on_dataset` restores the mode of the module it is given, and of its children.
    wrapper.training = model.training
    return wrapper


def build_tta_mapper(cfg: CfgNode) -> DatasetMapperTTA:
    """Returns the mapper that augments an image; without TEST.AUG, it only resizes it."""
    if cfg.TEST.AUG.ENABLED:
        return DatasetMapperTTA(cfg)
    return DatasetMapperTTA((cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST, flip=False)


class BoxAveragingRCNN(GeneralizedRCNNWithTTA):
    """`GeneralizedRCNNWithTTA` with the box averaging of Gidaris and Komodakis (2015).

    Boxes are scored and refined for several rounds, each starting from the refined boxes of the
    last. Non-maximum suppression selects among the boxes of all rounds and augmented images; each
    selected box becomes the score-weighted mean of the boxes of its class that overlap it.
    """

    def __init__(self, cfg: CfgNode, model: GeneralizedRCNN) -> None:
        """Wraps a two-stage detector.

        Args:
            cfg: the config, with TEST.BOX_AVERAGING.
            model: a detector whose RoI heads have `predict_regions`.
        """
        super().__init__(cfg, model, build_tta_mapper(cfg))
        settings = cfg.TEST.BOX_AVERAGING
        self.rounds = settings.ROUNDS
        self.candidates = settings.CANDIDATES
        self.vote_thresh = settings.VOTE_THRESH
        if self.rounds < 1 or self.candidates < 1 or not 0 < self.vote_thresh <= 1:
            raise UserError(
                "TEST.BOX_AVERAGING must have ROUNDS and CANDIDATES above 0 and VOTE_THRESH in "
                f"(0, 1], got {self.rounds}, {self.candidates} and {self.vote_thresh}"
            )

    def _get_augmented_boxes(
        self, augmented_inputs: list[dict[str, Any]], tfms: list[Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, classes = [], [], []
        for augmented_input, transform in zip(augmented_inputs, tfms, strict=True):
            for detections in self.refine(augmented_input):
                augmented = detections.pred_boxes.tensor.cpu().numpy()
                original = np.ascontiguousarray(transform.inverse().apply_box(augmented))
                boxes.append(torch.from_numpy(original).to(detections.scores.device))
                scores.append(detections.scores.float())
                classes.append(detections.pred_classes)
        return torch.cat(boxes), torch.cat(scores), torch.cat(classes)

    def _merge_detections(
        self, all_boxes: Tensor, all_scores: Tensor, all_classes: Tensor, shape_hw: tuple[int, int]
    ) -> Instances:
        merged = super()._merge_detections(all_boxes, all_scores, all_classes, shape_hw)
        candidates = Boxes(all_boxes)
        candidates.clip(shape_hw)
        merged.pred_boxes = Boxes(
            average_boxes(merged, candidates.tensor, all_scores, all_classes, self.vote_thresh)
        )
        return merged

    @torch.no_grad()
    def refine(self, augmented_input: dict[str, Any]) -> list[Instances]:
        """Returns the boxes, scores and classes of each round, before non-maximum suppression.

        Args:
            augmented_input: one augmented image, as an input of the model.
        """
        model = self.model
        images = model.preprocess_image([augmented_input])
        features = model.backbone(images.tensor)
        (proposals,), _ = model.proposal_generator(images, features, None)
        size = proposals.image_size
        rounds = [self._score(features, size, proposals.proposal_boxes)]
        for _ in range(1, self.rounds):
            last = rounds[-1]
            rounds.append(self._score(features, size, last.pred_boxes, last.pred_classes))
        return rounds

    def _score(
        self,
        features: dict[str, Tensor],
        size: tuple[int, int],
        regions: Boxes,
        classes: Tensor | None = None,
    ) -> Instances:
        """Scores and refines regions, for the given class of each or for all classes."""
        heads = self.model.roi_heads
        proposals = [Instances(size, proposal_boxes=regions)]
        predictions = heads.predict_regions(features, [regions])
        (scores,) = heads.box_predictor.predict_probs(predictions, proposals)
        (boxes,) = heads.box_predictor.predict_boxes(predictions, proposals)
        if classes is not None:
            scores = scores * F.one_hot(classes, scores.shape[1])
        # No IoU exceeds 2: the candidates with the highest scores, without suppression.
        threshold = heads.box_predictor.test_score_thresh
        return fast_rcnn_inference_single_image(
            boxes, scores, size, threshold, 2.0, self.candidates
        )[0]


def average_boxes(
    kept: Instances, boxes: Tensor, scores: Tensor, classes: Tensor, iou_thresh: float
) -> Tensor:
    """Replaces each box by the score-weighted mean of the boxes of its class that overlap it.

    Args:
        kept: M detections after non-maximum suppression.
        boxes: all boxes, Tensor[R, 4].
        scores: their scores, Tensor[R].
        classes: their classes, Tensor[R].
        iou_thresh: minimum IoU of a box with the detection to which it contributes.

    Returns:
        Tensor[M, 4].
    """
    overlapping = pairwise_iou(kept.pred_boxes, Boxes(boxes)) >= iou_thresh
    overlapping &= kept.pred_classes[:, None] == classes[None]
    with without_autocast(boxes):  # coordinates need float32
        weights = overlapping * scores
        total = weights.sum(dim=1, keepdim=True)
        # An empty box has no IoU even with itself; it is kept.
        return torch.where(total > 0, weights @ boxes / total, kept.pred_boxes.tensor)


class SemanticSegmentorWithTTA(nn.Module):
    """A `SemanticSegmentor` with test-time augmentation: probabilities are averaged."""

    def __init__(self, cfg: CfgNode, model: SemanticSegmentor) -> None:
        """Wraps a model.

        Args:
            cfg: the config, with TEST.AUG.
            model: the model.
        """
        super().__init__()
        self.model = model
        self.tta_mapper = build_tta_mapper(cfg)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Computes the probabilities of each pixel.

        Args:
            batched_inputs: inputs of the model.

        Returns:
            for each image the probabilities `sem_seg`, Tensor[classes, height, width].
        """
        return [{"sem_seg": self._average(item)} for item in batched_inputs]

    def _average(self, item: dict[str, Any]) -> Tensor:
        height, width = item["image"].shape[1:]
        augmented_inputs = self.tta_mapper({"height": height, "width": width, **item})
        total: Tensor | float = 0.0
        for augmented_input in augmented_inputs:
            transforms = augmented_input.pop("transforms")
            (result,) = self.model([augmented_input])
            probabilities = result["sem_seg"]
            if not getattr(self.model.sem_seg_head, "probabilities", False):
                probabilities = probabilities.softmax(dim=0)
            flipped = any(isinstance(t, HFlipTransform) for t in transforms.transforms)
            total = total + (probabilities.flip(2) if flipped else probabilities)
        return total / len(augmented_inputs)
