# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The category-aware RPN: labels, losses over the sampled anchors, proposals and detections."""

from __future__ import annotations

import math

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, batched_nms
from detectron2.modeling import build_model, build_proposal_generator
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from dcn_plugin.modeling.proposal_generator import CategoryDetector, CategoryRPN
from tests.modeling.networks import ground_truth, inputs, network_config
from tests.modeling.scalar_reference import cross_entropy, deltas, iou, smooth_l1

SHAPES = {"reduced": ShapeSpec(channels=32, stride=16)}
CLASSES = 5
SIZE = (128, 160)
TRUTH = [[3.0, 5, 61, 70], [10, 2, 90, 50], [60, 30, 150, 115]]


def config(beta: float = 1 / 9) -> CfgNode:
    cfg = network_config("ca_rpn", deformable=False)
    cfg.MODEL.RPN.SMOOTH_L1_BETA = beta
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 64
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64, 96]]
    return cfg


def sharp(generator: CategoryRPN) -> CategoryRPN:
    """Gives a generator non-zero predictions."""
    for name, parameter in generator.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02 if "deltas" in name else 0.1)
    return generator


def features() -> dict[str, torch.Tensor]:
    return {"reduced": torch.randn(1, 32, 8, 10)}


def anchors_and_predictions(generator: CategoryRPN, given: dict[str, torch.Tensor]):
    """Returns anchors, logits and deltas, read from the head's maps cell by cell."""
    logits, coded = (maps[0][0] for maps in generator.rpn_head([given["reduced"]]))
    (boxes,) = generator.anchor_generator([given["reduced"]])
    rows = []
    for y in range(8):
        for x in range(10):
            for a in range(9):
                here = slice(a * (CLASSES + 1), (a + 1) * (CLASSES + 1))
                rows.append((logits[here, y, x], coded[4 * a : 4 * a + 4, y, x]))
    return boxes.tensor, torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


def test_losses_are_means_over_the_sampled_anchors() -> None:
    generator = sharp(CategoryRPN(config(), SHAPES)).train()
    given, objects = features(), ground_truth(SIZE, TRUTH, [3, 1, 4])
    boxes, logits, coded = anchors_and_predictions(generator, given)
    torch.manual_seed(5)
    with EventStorage():
        labels = generator.label_and_sample_anchors([Boxes(boxes)], [objects])[0][0]
    torch.manual_seed(5)
    with EventStorage():
        images = ImageList(torch.zeros(1, 3, *SIZE), [SIZE])
        _, losses = generator(images, given, [objects])
    of_classes = of_boxes = 0.0
    for index, label in enumerate(labels.tolist()):
        if label >= 0:
            of_classes += cross_entropy(logits[index].tolist(), label)
        if 0 <= label < CLASSES:
            box = boxes[index].tolist()
            best = max(TRUTH, key=lambda true: iou(box, true))
            wanted = deltas(box, best, (1, 1, 1, 1))
            of_boxes += smooth_l1(coded[index].tolist(), wanted, 1 / 9)
    assert losses["loss_rpn_cls"].item() == pytest.approx(of_classes / 64, rel=1e-4)
    assert losses["loss_rpn_loc"].item() == pytest.approx(of_boxes / 64, rel=1e-4)


def test_anchors_have_the_class_of_the_object_they_overlap_most() -> None:
    generator = CategoryRPN(config(), SHAPES)
    objects = ground_truth(SIZE, TRUTH, [3, 1, 4])
    (boxes,) = generator.anchor_generator([features()["reduced"]])
    labels = generator.label_and_sample_anchors([boxes], [objects])[0][0]
    overlaps = [[iou(box, true) for true in TRUTH] for box in boxes.tensor.tolist()]
    most = [max(column) for column in zip(*overlaps, strict=True)]
    positive = 0
    for row, label in zip(overlaps, labels.tolist(), strict=True):
        best = max(range(3), key=lambda i: row[i])
        is_object = row[best] >= 0.7 or any(
            row[i] == pytest.approx(most[i], abs=1e-6) for i in range(3)
        )
        if 0 <= label < CLASSES:
            positive += 1
            assert is_object and label == int(objects.gt_classes[best])
        elif label == CLASSES:
            assert row[best] < 0.3 and not is_object
    assert 3 <= positive <= 32 and int((labels >= 0).sum()) == 64


def test_image_without_objects_is_all_background() -> None:
    generator = CategoryRPN(config(), SHAPES)
    (boxes,) = generator.anchor_generator([features()["reduced"]])
    labels, _ = generator.label_and_sample_anchors([boxes], [ground_truth(SIZE, [], [])])
    assert set(labels[0].tolist()) == {-1, CLASSES}


def decoded(box: torch.Tensor, coded: torch.Tensor) -> list[float]:
    """Decodes the deltas of a box and clips it to the image."""
    width, height = (box[2] - box[0]).item(), (box[3] - box[1]).item()
    dx, dy, dw, dh = coded.tolist()
    x, y = box[0].item() + width / 2 + dx * width, box[1].item() + height / 2 + dy * height
    width, height = width * math.exp(dw), height * math.exp(dh)
    found = x - width / 2, y - height / 2, x + width / 2, y + height / 2
    return [
        min(max(value, 0), limit)
        for value, limit in zip(found, (*SIZE[::-1], *SIZE[::-1]), strict=True)
    ]


@torch.no_grad()
def test_detections_are_selected_per_class() -> None:
    generator = sharp(CategoryDetector(config(), SHAPES)).eval()
    given = features()
    boxes, logits, coded = anchors_and_predictions(generator, given)
    images = ImageList(torch.zeros(1, 3, *SIZE), [SIZE])
    (found,), _ = generator(images, given)
    all_boxes = torch.tensor([decoded(b, c) for b, c in zip(boxes, coded, strict=True)])
    scores = logits.softmax(dim=1)[:, :CLASSES]
    rows, classes = (scores > 0.001).nonzero().T
    kept = batched_nms(all_boxes[rows], scores[rows, classes], classes, 0.3)[:100]
    torch.testing.assert_close(found.scores, scores[rows, classes][kept])
    torch.testing.assert_close(found.pred_boxes.tensor, all_boxes[rows][kept], rtol=1e-4, atol=1e-3)
    assert torch.equal(found.pred_classes, classes[kept])


@torch.no_grad()
def test_proposals_are_the_boxes_least_likely_background() -> None:
    generator = sharp(CategoryRPN(config(), SHAPES)).eval()
    given = features()
    boxes, logits, coded = anchors_and_predictions(generator, given)
    (found,), _ = generator(ImageList(torch.zeros(1, 3, *SIZE), [SIZE]), given)
    objectness = 1 - logits.softmax(dim=1)[:, CLASSES]
    best = objectness.argmax()
    torch.testing.assert_close(found.objectness_logits[0].sigmoid(), objectness[best])
    expected = torch.tensor(decoded(boxes[best], coded[best]))
    torch.testing.assert_close(found.proposal_boxes.tensor[0], expected, rtol=1e-4, atol=1e-3)
    assert (found.objectness_logits.diff() <= 0).all()


def test_is_a_proposal_generator_of_two_stage_detectors() -> None:
    cfg = network_config("faster_rcnn", deformable=True)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "CategoryRPN"
    cfg.MODEL.RPN.HEAD_NAME = "CategoryRPNHead"
    model = build_model(cfg)
    assert type(model.proposal_generator) is CategoryRPN
    with EventStorage():
        losses = model(inputs())
    assert losses.keys() == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    results = model.eval()(inputs())
    assert all(isinstance(r["instances"], Instances) for r in results)


def test_head_must_be_category_rpn_head() -> None:
    cfg = config()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "CategoryRPN"
    cfg.MODEL.RPN.HEAD_NAME = "StandardRPNHead"
    with pytest.raises(ValueError, match=r"HEAD_NAME must be CategoryRPNHead .* StandardRPNHead"):
        build_proposal_generator(cfg, SHAPES)
