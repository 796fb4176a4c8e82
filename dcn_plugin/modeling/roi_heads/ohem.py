# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Online hard example mining: training on the RoIs with the highest losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detectron2.layers import cat
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from fvcore.nn import smooth_l1_loss


@torch.no_grad()
def select_hard_rois(
    predictor: FastRCNNOutputLayers,
    predictions: tuple[Tensor, Tensor],
    proposals: list[Instances],
    count: int,
) -> list[Tensor]:
    """Returns the indices of the RoIs with the highest losses, highest first, for each image.

    Args:
        predictor: has the loss weights; class-agnostic, with a smooth L1 loss.
        predictions: logits Tensor[R, C+1] and deltas Tensor[R, 4].
        proposals: RoIs of each image, with ground-truth classes and boxes.
        count: maximum number of RoIs per image.
    """
    losses = per_roi_loss(predictor, predictions, proposals)
    per_image = losses.split([len(p) for p in proposals])
    return [loss.topk(min(count, len(loss))).indices for loss in per_image]


def per_roi_loss(
    predictor: FastRCNNOutputLayers, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
) -> Tensor:
    """Returns Tensor[R], the sum of classification and box loss of each RoI.

    Args:
        predictor: as in `select_hard_rois`.
        predictions: as in `select_hard_rois`.
        proposals: as in `select_hard_rois`.
    """
    logits, deltas = predictions
    gt_classes = cat([p.gt_classes for p in proposals])
    losses = F.cross_entropy(logits.float(), gt_classes, reduction="none")
    fg_inds = (gt_classes < predictor.num_classes).nonzero().squeeze(1)
    boxes = cat([p.proposal_boxes.tensor for p in proposals])
    # As in FastRCNNOutputLayers.losses: an image without objects has no gt_boxes. The proposals
    # are a placeholder, since only foreground RoIs are read.
    gt_boxes = cat(
        [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals]
    )
    gt_deltas = predictor.box2box_transform.get_deltas(boxes[fg_inds], gt_boxes[fg_inds])
    box_losses = smooth_l1_loss(deltas[fg_inds].float(), gt_deltas, predictor.smooth_l1_beta)
    weights = predictor.loss_weight
    losses *= weights.get("loss_cls", 1.0)
    return losses.index_add(0, fg_inds, box_losses.sum(dim=1) * weights.get("loss_box_reg", 1.0))
