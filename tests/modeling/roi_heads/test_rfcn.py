# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI heads of R-FCN: pooling, online hard example mining and losses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from dcn_plugin.modeling import RFCNROIHeads
from dcn_plugin.modeling.roi_heads.ohem import per_roi_loss, select_hard_rois
from tests import roi_reference
from tests.modeling.networks import ground_truth, network_config
from tests.modeling.scalar_reference import cross_entropy, deltas, iou, smooth_l1

SHAPES = {"reduced": ShapeSpec(channels=8, stride=16)}
CLASSES = 5
BOXES = [[3.0, 5, 61, 70], [10, 2, 90, 50], [40, 30, 100, 95]]


def heads_config(deformable: bool = True, ohem: int = 4, beta: float = 0.3) -> CfgNode:
    cfg = network_config("rfcn", deformable)
    cfg.MODEL.ROI_HEADS.OHEM = ohem
    cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = beta
    cfg.MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2
    return cfg


def make_heads(**settings: object) -> RFCNROIHeads:
    return RFCNROIHeads(heads_config(**settings), SHAPES)


def proposals_of(size: tuple[int, int], count: int, generator: torch.Generator) -> Instances:
    corners = torch.rand(count, 2, generator=generator) * 60
    sides = torch.rand(count, 2, generator=generator) * 40 + 5
    found = Instances(size)
    found.proposal_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
    found.objectness_logits = torch.zeros(count)
    return found


@pytest.mark.parametrize("deformable", [False, True])
def test_predictions_are_means_over_the_bins(deformable: bool) -> None:
    heads = make_heads(deformable=deformable).double()
    predictor = heads.box_predictor
    for parameter in predictor.parameters():
        nn.init.normal_(parameter, std=0.5)
    features = torch.randn(1, 8, 7, 8, dtype=torch.float64)
    scores, boxes = predictor(features, [Boxes(torch.tensor(BOXES))])
    rois = torch.cat([torch.zeros(3, 1), torch.tensor(BOXES)], dim=1)
    call = {"output_size": (3, 3), "spatial_scale": 1 / 16, "sampling_ratio": 2, "mode": "align"}
    call |= {"part_size": (3, 3), "group_size": (3, 3), "gamma": 0.1}

    def vote(pool: nn.Module) -> torch.Tensor:
        offset = None
        if deformable:
            maps = pool.offset_conv(features)
            offset = roi_reference.deform_ps_roi_pool(maps, rois, None, **call)
        pooled = roi_reference.deform_ps_roi_pool(pool.score_conv(features), rois, offset, **call)
        return pooled.mean(dim=(2, 3))

    torch.testing.assert_close(scores, vote(predictor.cls_score))
    torch.testing.assert_close(boxes, vote(predictor.bbox_pred))
    assert scores.shape == (3, CLASSES + 1) and boxes.shape == (3, 4)
    if deformable:  # offsets for each class and background; one set for boxes
        assert predictor.cls_score.offset_conv.out_channels == 2 * 9 * (CLASSES + 1)
        assert predictor.bbox_pred.offset_conv.out_channels == 2 * 9


def labelled(size: tuple[int, int], count: int, objects: bool, seed: int) -> Instances:
    """Returns proposals with labels, as they come from Detectron2's matcher."""
    generator = torch.Generator().manual_seed(seed)
    found = proposals_of(size, count, generator)
    found.gt_classes = torch.full((count,), CLASSES)
    if objects:
        found.gt_classes = torch.randint(0, CLASSES + 1, (count,), generator=generator)
        found.gt_boxes = proposals_of(size, count, generator).proposal_boxes
    return found


def reference_losses(heads: RFCNROIHeads, predictions, proposals) -> list[tuple[float, float]]:
    """Returns the classification and box loss of each RoI."""
    predictor, losses, row = heads.box_predictor, [], 0
    for image in proposals:
        for index in range(len(image)):
            logits, coded = (p[row].tolist() for p in predictions)
            label, of_box = int(image.gt_classes[index]), 0.0
            if label < CLASSES:
                box = image.proposal_boxes.tensor[index].tolist()
                wanted = deltas(box, image.gt_boxes.tensor[index].tolist(), (10, 10, 5, 5))
                of_box = smooth_l1(coded, wanted, predictor.smooth_l1_beta)
            losses.append((cross_entropy(logits, label), of_box))
            row += 1
    return losses


@pytest.mark.parametrize("ohem", [1, 4, 100])
def test_ohem_selects_the_rois_with_the_highest_losses(ohem: int) -> None:
    heads = make_heads(ohem=ohem).train()
    proposals = [labelled((100, 130), 9, True, 0), labelled((90, 140), 7, False, 1)]
    predictions = torch.randn(16, CLASSES + 1), torch.randn(16, 4) * 0.1
    each = reference_losses(heads, predictions, proposals)
    torch.testing.assert_close(
        per_roi_loss(heads.box_predictor, predictions, proposals),
        torch.tensor([sum(both) for both in each]),
        rtol=1e-4,
        atol=1e-4,
    )
    chosen = []
    for start, count in ((0, 9), (9, 7)):
        order = sorted(range(start, start + count), key=lambda i: -sum(each[i]))
        chosen.append(order[:ohem])
    found = select_hard_rois(heads.box_predictor, predictions, proposals, ohem)
    assert [f.tolist() for f in found] == [chosen[0], [i - 9 for i in chosen[1]]]

    with EventStorage():
        losses = heads.box_predictor.losses(*heads._select_hard_rois(predictions, proposals))
    for key, part in (("loss_cls", 0), ("loss_box_reg", 1)):
        kept = [each[i][part] for i in chosen[0] + chosen[1]]
        assert losses[key].item() == pytest.approx(sum(kept) / len(kept), rel=1e-4)


@pytest.mark.parametrize("ohem", [0, 4])
def test_rois_are_labelled_by_their_overlap(ohem: int) -> None:
    heads = make_heads(ohem=ohem).train()
    objects = ground_truth((100, 130), BOXES, [3, 1, 0])
    proposals = proposals_of((100, 130), 50, torch.Generator().manual_seed(2))
    with EventStorage():
        (labels,) = heads.label_and_sample_proposals([proposals], [objects])
    assert len(labels) == 53  # with the ground-truth boxes appended
    for index, label in enumerate(labels.gt_classes.tolist()):
        box = labels.proposal_boxes.tensor[index].tolist()
        overlaps = [iou(box, true) for true in BOXES]
        best = max(range(3), key=lambda i: overlaps[i])
        assert label == (int(objects.gt_classes[best]) if overlaps[best] >= 0.5 else CLASSES)


def test_ohem_labels_more_rois_than_detectron2_samples() -> None:
    proposals = proposals_of((100, 130), 50, torch.Generator().manual_seed(2))
    objects = ground_truth((100, 130), BOXES, [3, 1, 0])
    counts = []
    for ohem in (0, 4):
        cfg = heads_config(ohem=ohem)
        cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
        heads = RFCNROIHeads(cfg, SHAPES)
        with EventStorage():
            counts.append(len(heads.label_and_sample_proposals([proposals], [objects])[0]))
    assert counts == [8, 53]


def test_box_coding_equals_the_scalar_reference() -> None:
    boxes, wanted = (torch.tensor(BOXES), torch.tensor(BOXES[::-1]))
    coded = Box2BoxTransform((10, 10, 5, 5)).get_deltas(boxes, wanted)
    for index in range(3):
        expected = deltas(boxes[index].tolist(), wanted[index].tolist(), (10, 10, 5, 5))
        assert coded[index].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ROI_HEADS.OHEM", -1, "MODEL.ROI_HEADS.OHEM must be .*, got -1"),
        ("ROI_HEADS.IN_FEATURES", ["res4", "reduced"], "must be one of .*, got"),
        (
            "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE",
            "giou",
            "must be smooth_l1 if .*OHEM",
        ),
        ("ROI_BOX_HEAD.POOLER_MODE", "max", "mode must be one of .*, got 'max'"),
    ],
)
def test_error_names_the_config_key(key: str, value: object, message: str) -> None:
    cfg = heads_config()
    cfg.MODEL.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        RFCNROIHeads(cfg, SHAPES)
