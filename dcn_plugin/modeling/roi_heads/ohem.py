# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Online hard example mining: learning from the RoIs with the highest losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detectron2.layers import cat
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Instances
from fvcore.nn import smooth_l1_loss


@torch.no_grad()
def find_hardest(
    predictor: FastRCNNOutputLayers,
    predictions: tuple[Tensor, Tensor],
    proposals: list[Instances],
    count: int,
) -> list[Tensor]:
    """Finds the RoIs of each image with the highest losses.

    Args:
        predictor: whose losses they are; class-agnostic, with a smooth L1 loss.
        predictions: logits Tensor[R, C+1] and deltas Tensor[R, 4].
        proposals: of each image, with the classes and boxes of the truth.
        count: how many to find in an image.

    Returns:
        for each image the indices of its hardest RoIs, at most `count`, the hardest first.
    """
    losses = loss_of_each(predictor, predictions, proposals)
    parts = losses.split([len(p) for p in proposals])
    return [part.topk(min(count, len(part))).indices for part in parts]


def loss_of_each(
    predictor: FastRCNNOutputLayers, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
) -> Tensor:
    """Computes Tensor[R], the losses of class and box of each RoI together.

    Args:
        predictor: as in `find_hardest`, like the others.
        predictions: logits and deltas.
        proposals: of each image.
    """
    logits, deltas = predictions
    classes = cat([p.gt_classes for p in proposals])
    losses = F.cross_entropy(logits.float(), classes, reduction="none")
    objects = (classes < predictor.num_classes).nonzero().squeeze(1)
    boxes = cat([p.proposal_boxes.tensor for p in proposals])
    # An image without objects has no boxes of the truth, and nobody asks for them.
    truth = cat([(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in proposals])
    wanted = predictor.box2box_transform.get_deltas(boxes[objects], truth[objects])
    of_boxes = smooth_l1_loss(deltas[objects].float(), wanted, predictor.smooth_l1_beta)
    weights = predictor.loss_weight
    losses *= weights.get("loss_cls", 1.0)
    return losses.index_add(0, objects, of_boxes.sum(dim=1) * weights.get("loss_box_reg", 1.0))
