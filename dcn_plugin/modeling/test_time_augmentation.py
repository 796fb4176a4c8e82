# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Several scales at test time, and iterative bounding-box averaging (section 4.3)."""

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
    SemanticSegmentor,
)
from detectron2.structures import Boxes, Instances, pairwise_iou
from fvcore.transforms import HFlipTransform

from dcn_plugin.config import with_dcn_defaults
from dcn_plugin.layers.offset_branch import without_autocast


def build_model_with_tta(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Builds what tests a trained network as the config says.

    Args:
        cfg: with TEST.AUG, as in Detectron2, and TEST.BOX_AVERAGING.
        model: one of the four networks, or any that Detectron2 augments.

    Returns:
        a module that is called as the model is.

    Raises:
        ValueError: if the network cannot be tested like that.
    """
    if isinstance(model, DistributedDataParallel):
        model = model.module
    cfg = with_dcn_defaults(cfg)
    if cfg.TEST.BOX_AVERAGING.ENABLED:
        if not hasattr(getattr(model, "roi_heads", None), "predict_regions"):
            raise ValueError(
                "TEST.BOX_AVERAGING.ENABLED must be False for a model without DeformROIHeads or "
                f"RFCNROIHeads, which score boxes again; this is a {type(model).__name__}"
            )
        wrapper: nn.Module = BoxAveragingRCNN(cfg, model)
    elif isinstance(model, SemanticSegmentor):
        wrapper = SemanticSegmentorWithTTA(cfg, model)
    else:
        wrapper = GeneralizedRCNNWithTTA(cfg, model)
    # `inference_on_dataset` restores the mode of the module it is given, and of its children.
    wrapper.training = model.training
    return wrapper


def views(cfg: CfgNode) -> DatasetMapperTTA:
    """Returns what makes the versions of an image that are tested."""
    if cfg.TEST.AUG.ENABLED:
        return DatasetMapperTTA(cfg)
    return DatasetMapperTTA((cfg.INPUT.MIN_SIZE_TEST,), cfg.INPUT.MAX_SIZE_TEST, flip=False)


class BoxAveragingRCNN(GeneralizedRCNNWithTTA):
    """Detectron2's test-time augmentation with the boxes of Gidaris and Komodakis (2015).

    Boxes are scored and refined again from where they were refined to, for some rounds. Of all
    boxes of all rounds and versions of the image, non-maximum suppression keeps the best, and
    each of those becomes the mean of those of its class that overlap it, weighted by score.
    """

    def __init__(self, cfg: CfgNode, model: GeneralizedRCNN) -> None:
        """Takes a trained detector of two stages.

        Args:
            cfg: with TEST.BOX_AVERAGING.
            model: whose heads have `predict_regions`.
        """
        super().__init__(cfg, model, views(cfg))
        settings = cfg.TEST.BOX_AVERAGING
        self.rounds = settings.ROUNDS
        self.candidates = settings.CANDIDATES
        self.vote_thresh = settings.VOTE_THRESH
        if self.rounds < 1 or self.candidates < 1 or not 0 < self.vote_thresh <= 1:
            raise ValueError(
                "TEST.BOX_AVERAGING must have ROUNDS and CANDIDATES above 0 and VOTE_THRESH in "
                f"(0, 1], got {self.rounds}, {self.candidates} and {self.vote_thresh}"
            )

    def _get_augmented_boxes(
        self, augmented_inputs: list[dict[str, Any]], tfms: list[Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, classes = [], [], []
        for version, transform in zip(augmented_inputs, tfms, strict=True):
            for found in self.refine(version):
                there = found.pred_boxes.tensor.cpu().numpy()
                back = np.ascontiguousarray(transform.inverse().apply_box(there))
                boxes.append(torch.from_numpy(back).to(found.scores.device))
                scores.append(found.scores.float())
                classes.append(found.pred_classes)
        return torch.cat(boxes), torch.cat(scores), torch.cat(classes)

    def _merge_detections(
        self, all_boxes: Tensor, all_scores: Tensor, all_classes: Tensor, shape_hw: tuple[int, int]
    ) -> Instances:
        merged = super()._merge_detections(all_boxes, all_scores, all_classes, shape_hw)
        voters = Boxes(all_boxes)
        voters.clip(shape_hw)
        merged.pred_boxes = Boxes(
            vote(merged, voters.tensor, all_scores, all_classes, self.vote_thresh)
        )
        return merged

    @torch.no_grad()
    def refine(self, version: dict[str, Any]) -> list[Instances]:
        """Detects in one version of an image.

        Args:
            version: an input of the network.

        Returns:
            boxes, scores and classes of every round, before non-maximum suppression.
        """
        model = self.model
        images = model.preprocess_image([version])
        features = model.backbone(images.tensor)
        (proposals,), _ = model.proposal_generator(images, features, None)
        first = self._score(features, proposals.image_size, proposals.proposal_boxes)
        rounds = [first]
        for _ in range(1, self.rounds):
            last = rounds[-1]
            rounds.append(
                self._score(features, last.image_size, last.pred_boxes, last.pred_classes)
            )
        return rounds

    def _score(
        self,
        features: dict[str, Tensor],
        size: tuple[int, int],
        regions: Boxes,
        classes: Tensor | None = None,
    ) -> Instances:
        """Scores and refines boxes for the class that each has, or for all where none is given."""
        heads = self.model.roi_heads
        proposals = [Instances(size, proposal_boxes=regions)]
        predictions = heads.predict_regions(features, [regions])
        (scores,) = heads.box_predictor.predict_probs(predictions, proposals)
        (boxes,) = heads.box_predictor.predict_boxes(predictions, proposals)
        finite = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
        wanted = (scores[:, :-1] > heads.box_predictor.test_score_thresh) & finite[:, None]
        if classes is not None:
            wanted &= F.one_hot(classes, wanted.shape[1]).bool()
        rows, classes = wanted.nonzero().unbind(dim=1)
        best = scores[rows, classes].topk(min(self.candidates, len(rows))).indices
        rows, classes = rows[best], classes[best]
        by_class = boxes.unflatten(1, (-1, 4))  # of each class, or one for all
        refined = Boxes(by_class[rows, classes if by_class.shape[1] > 1 else 0])
        refined.clip(size)
        return Instances(
            size, pred_boxes=refined, scores=scores[rows, classes], pred_classes=classes
        )


def vote(kept: Instances, boxes: Tensor, scores: Tensor, classes: Tensor, overlap: float) -> Tensor:
    """Averages boxes by their scores.

    Args:
        kept: what non-maximum suppression left, M boxes with classes.
        boxes: Tensor[R, 4], the voters.
        scores: Tensor[R].
        classes: Tensor[R].
        overlap: the least IoU of a voter with the box that it votes on.

    Returns:
        Tensor[M, 4], the mean of each box's voters.
    """
    votes = pairwise_iou(kept.pred_boxes, Boxes(boxes)) >= overlap
    votes &= kept.pred_classes[:, None] == classes[None]
    with without_autocast(boxes):  # coordinates need all of float32
        weights = votes * scores
        total = weights.sum(dim=1, keepdim=True)
        # A box of no area overlaps nothing, not even itself: it stays.
        return torch.where(total > 0, weights @ boxes / total, kept.pred_boxes.tensor)


class SemanticSegmentorWithTTA(nn.Module):
    """Tests a network for semantic segmentation on several versions of an image.

    Probabilities of all versions are averaged at the image's own size.
    """

    def __init__(self, cfg: CfgNode, model: SemanticSegmentor) -> None:
        """Takes a trained network.

        Args:
            cfg: with TEST.AUG.
            model: under test.
        """
        super().__init__()
        self.model = model
        self.views = views(cfg)

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """Segments.

        Args:
            batched_inputs: as the network takes them.

        Returns:
            for each image `sem_seg`, Tensor[classes, height, width] of probabilities.
        """
        return [{"sem_seg": self._average(one)} for one in batched_inputs]

    def _average(self, one: dict[str, Any]) -> Tensor:
        height, width = one["image"].shape[1:]
        versions = self.views({"height": height, "width": width, **one})
        total: Tensor | float = 0.0
        for version in versions:
            transforms = version.pop("transforms")
            (result,) = self.model([version])
            found = result["sem_seg"]
            if not getattr(self.model.sem_seg_head, "probabilities", False):
                found = found.softmax(dim=0)
            flipped = any(isinstance(t, HFlipTransform) for t in transforms.transforms)
            total = total + (found.flip(2) if flipped else found)
        return total / len(versions)
