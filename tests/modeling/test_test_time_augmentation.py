# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Test-time augmentation and box averaging, against slow references."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model
from detectron2.structures import Boxes, Instances

from dcn_plugin.config import with_dcn_defaults
from dcn_plugin.modeling.test_time_augmentation import (
    BoxAveragingRCNN,
    SemanticSegmentorWithTTA,
    average_boxes,
    build_model_with_tta,
)

from .networks import NETWORKS, inputs, network_config
from .scalar_reference import iou


def config(network: str, averaging: bool, scales: tuple[int, ...] = (64, 96)) -> CfgNode:
    cfg = network_config(network, deformable=True)
    cfg.TEST.AUG.ENABLED = bool(scales)
    cfg.TEST.AUG.MIN_SIZES = scales
    cfg.TEST.BOX_AVERAGING.ENABLED = averaging
    cfg.INPUT.MIN_SIZE_TEST = 100
    return cfg


def augmented(network: str, averaging: bool, **more: Any) -> torch.nn.Module:
    cfg = config(network, averaging, **more)
    return build_model_with_tta(cfg, build_model(cfg).eval())


def one_input() -> dict[str, Any]:
    return {"image": inputs()[0]["image"], "height": 120, "width": 156}


@torch.no_grad()
@pytest.mark.parametrize("network", NETWORKS)
def test_tta_of_every_network(network: str) -> None:
    model = augmented(network, averaging=False)
    (result,) = model([one_input()])
    if network == "deeplab":
        assert result["sem_seg"].shape == (5, 120, 156)
        torch.testing.assert_close(result["sem_seg"].sum(dim=0), torch.ones(120, 156))
    else:
        assert type(model) is GeneralizedRCNNWithTTA
        found = result["instances"]
        assert found.image_size == (120, 156) and len(found) > 0
        assert found.pred_boxes.tensor.max() <= 156


def test_segmentation_averages_probabilities() -> None:
    model = augmented("deeplab", averaging=False)
    (result,) = model([one_input()])
    expected = []
    for augmented_input in model.tta_mapper(one_input()):
        transforms = augmented_input.pop("transforms").transforms
        found = model.model([augmented_input])[0]["sem_seg"].softmax(dim=0)
        expected.append(found.flip(2) if len(transforms) == 3 else found)
    assert len(expected) == 4  # two scales, each flipped and not
    torch.testing.assert_close(result["sem_seg"], torch.stack(expected).mean(dim=0))


def test_segmentation_takes_probabilities_as_they_are() -> None:
    cfg = config("deeplab", averaging=False)
    torch.manual_seed(4)
    logits = SemanticSegmentorWithTTA(cfg, build_model(cfg).eval())([one_input()])
    cfg.MODEL.SEM_SEG_HEAD.PROBABILITIES = True
    torch.manual_seed(4)
    probabilities = SemanticSegmentorWithTTA(cfg, build_model(cfg).eval())([one_input()])
    torch.testing.assert_close(
        probabilities[0]["sem_seg"], logits[0]["sem_seg"], rtol=1e-2, atol=1e-3
    )


def reference_average(kept: Instances, candidates: list, overlap: float) -> list[list[float]]:
    means = []
    boxes = zip(kept.pred_boxes.tensor.tolist(), kept.pred_classes.tolist(), strict=True)
    for box, label in boxes:
        total, summed = 0.0, [0.0] * 4
        for other, score, other_label in candidates:
            if other_label == label and iou(box, other) >= overlap:
                total += score
                summed = [s + score * v for s, v in zip(summed, other, strict=True)]
        means.append([s / total for s in summed] if total else box)
    return means


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("overlap", [0.3, 0.5, 1.0])
def test_average_equals_the_scalar_reference(seed: int, overlap: float) -> None:
    torch.manual_seed(seed)
    corners, sides = torch.rand(60, 2) * 20, torch.rand(60, 2) * 30 + 10
    boxes = torch.cat([corners, corners + sides], dim=1)
    boxes[7] = torch.tensor([5.0, 5, 5, 9])  # no area
    scores, classes = torch.rand(60), torch.randint(0, 3, (60,))
    kept = Instances((50, 50), pred_boxes=Boxes(boxes[:9].clone()), pred_classes=classes[:9])
    candidates = list(zip(boxes.tolist(), scores.tolist(), classes.tolist(), strict=True))
    expected = torch.tensor(reference_average(kept, candidates, overlap))
    found = average_boxes(kept, boxes, scores, classes, overlap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_averages_are_exact_under_autocast(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[900.0, 500, 1300, 700]]) + torch.rand(120, 4)
    scores, classes = torch.ones(120), torch.zeros(120, dtype=torch.int64)
    kept = Instances((800, 1400), pred_boxes=Boxes(boxes[:1].clone()), pred_classes=classes[:1])
    with torch.autocast("cpu", dtype=dtype):
        found = average_boxes(kept, boxes, scores, classes, 0.5)
    torch.testing.assert_close(found, boxes.mean(dim=0, keepdim=True))


@pytest.mark.parametrize("network", ["faster_rcnn", "rfcn"])
def test_averaged_boxes_have_an_area_under_autocast(network: str) -> None:
    model = augmented(network, averaging=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (result,) = model([one_input()])
    boxes = result["instances"].pred_boxes
    assert boxes.tensor.dtype == torch.float32 and boxes.nonempty().all()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("training", [False, True])
def test_model_keeps_its_training_mode(network: str, training: bool) -> None:
    cfg = config(network, averaging=False)
    model = build_model(cfg).train(training)
    with inference_context(build_model_with_tta(cfg, model)):
        assert not model.training
    assert model.training is training


def reference_merge(candidates: list, nms: float, overlap: float) -> list[tuple]:
    """Applies NMS per class and averages the boxes: (score, class, box)."""
    kept: list[tuple] = []
    for box, score, label in sorted(candidates, key=lambda v: -v[1]):
        if all(label != other or iou(box, taken) <= nms for _, other, taken in kept):
            kept.append((score, label, box))
    merged = []
    for score, label, box in kept:
        friends = [v for v in candidates if v[2] == label and iou(box, v[0]) >= overlap]
        total = sum(v[1] for v in friends)
        mean = [sum(v[1] * v[0][i] for v in friends) / total for i in range(4)]
        merged.append((score, label, mean))
    return merged


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_merging_equals_the_scalar_reference(averaging: bool, seed: int) -> None:
    model = augmented("rfcn", averaging)
    torch.manual_seed(seed)
    corners, sides = torch.rand(80, 2) * 60, torch.rand(80, 2) * 40 + 10
    boxes = torch.cat([corners, corners + sides], dim=1)
    scores, classes = torch.rand(80) + 0.01, torch.randint(0, 5, (80,))
    found = model._merge_detections(boxes.clone(), scores, classes, (120, 156))
    candidates = list(zip(boxes.tolist(), scores.tolist(), classes.tolist(), strict=True))
    # Without averaging, each box is the mean of itself only.
    expected = reference_merge(candidates, nms=0.3, overlap=0.5 if averaging else 1 - 1e-9)
    assert len(found) == len(expected) > 10
    torch.testing.assert_close(found.scores, torch.tensor([e[0] for e in expected]))
    assert found.pred_classes.tolist() == [e[1] for e in expected]
    torch.testing.assert_close(
        found.pred_boxes.tensor, torch.tensor([e[2] for e in expected]), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("network", ["faster_rcnn", "rfcn"])
@pytest.mark.parametrize("scales", [(64, 96), ()], ids=["scales", "one scale"])
def test_boxes_are_averaged(network: str, scales: tuple[int, ...]) -> None:
    model = augmented(network, averaging=True, scales=scales)
    assert isinstance(model, BoxAveragingRCNN)
    (result,) = model([one_input()])
    found = result["instances"]
    assert 0 < len(found) <= 100 and found.image_size == (120, 156)
    augmented_inputs, transforms = model._get_augmented_inputs(one_input())
    assert len(augmented_inputs) == (4 if scales else 1)
    boxes, scores, classes = model._get_augmented_boxes(augmented_inputs, transforms)
    merged = GeneralizedRCNNWithTTA._merge_detections(model, boxes, scores, classes, (120, 156))
    clipped = Boxes(boxes.clone())
    clipped.clip((120, 156))
    candidates = zip(clipped.tensor.tolist(), scores.tolist(), classes.tolist(), strict=True)
    expected = torch.tensor(reference_average(merged, list(candidates), 0.5))
    torch.testing.assert_close(found.pred_boxes.tensor, expected, rtol=1e-3, atol=1e-2)
    assert torch.equal(found.scores, merged.scores)


@torch.no_grad()
def test_a_second_round_scores_the_refined_boxes() -> None:
    model = augmented("faster_rcnn", averaging=True, scales=())
    augmented_input = {"image": inputs()[0]["image"]}
    first, second = model.refine(augmented_input)
    heads, net = model.model.roi_heads, model.model
    features = net.backbone(net.preprocess_image([augmented_input]).tensor)
    predictions = heads.predict_regions(features, [first.pred_boxes])
    probabilities = predictions[0].softmax(dim=1)
    regions = [Instances(first.image_size, proposal_boxes=first.pred_boxes)]
    (refined,) = heads.box_predictor.predict_boxes(predictions, regions)
    rows = torch.arange(len(first))
    expected = probabilities[rows, first.pred_classes]
    order = expected.argsort(descending=True)[: len(second)]
    torch.testing.assert_close(second.scores, expected[order])
    boxes = Boxes(refined.unflatten(1, (-1, 4))[rows, first.pred_classes][order])
    boxes.clip(first.image_size)
    torch.testing.assert_close(second.pred_boxes.tensor.sort(0)[0], boxes.tensor.sort(0)[0])
    assert len(first) <= 1000


@pytest.mark.parametrize("network", ["ca_rpn", "deeplab"])
def test_averaging_needs_two_stages(network: str) -> None:
    with pytest.raises(ValueError, match=r"BOX_AVERAGING.ENABLED must be False .* this is a"):
        augmented(network, averaging=True)


@pytest.mark.parametrize("key", ["LOAD_PROPOSALS", "KEYPOINT_ON"])
@pytest.mark.parametrize("averaging", [False, True])
def test_fixed_proposals_and_keypoints_cannot_be_scaled(key: str, averaging: bool) -> None:
    cfg = config("faster_rcnn", averaging)
    model = build_model(cfg)
    cfg.MODEL[key] = True
    with pytest.raises(ValueError, match=r"TEST.AUG.ENABLED must be False: .* not supported yet"):
        build_model_with_tta(cfg, model)


def stock_model(file: str) -> tuple[CfgNode, torch.nn.Module]:
    cfg = with_dcn_defaults(model_zoo.get_config(file))
    cfg.MODEL.DEVICE, cfg.TEST.AUG.ENABLED = "cpu", True
    return cfg, build_model(cfg)


def test_models_that_cannot_be_augmented_are_refused() -> None:
    cfg, model = stock_model("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml")
    with pytest.raises(ValueError, match=r"must be False for a PanopticFPN"):
        build_model_with_tta(cfg, model)
    cfg, model = stock_model("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    with pytest.raises(ValueError, match=r"TEST.AUG.ENABLED must be False: .*RetinaNet"):
        build_model_with_tta(cfg, model)


def reference_candidates(boxes, scores, classes, thresh: float, count: int) -> list[tuple]:
    """The (score, class, box) of the highest scores, of one class of each box if given."""
    found = []
    for index, row in enumerate(scores.tolist()):
        for label in range(len(row) - 1) if classes is None else [int(classes[index])]:
            if row[label] > thresh:
                found.append((row[label], label, boxes[index].tolist()))
    return sorted(found, reverse=True)[:count]


@pytest.mark.parametrize("given", [False, True])
def test_candidates_are_the_highest_scores(given: bool, monkeypatch) -> None:
    model = augmented("rfcn", averaging=True)
    model.candidates = 30
    predictor = model.model.roi_heads.box_predictor
    corners, sides = torch.rand(40, 2) * 60, torch.rand(40, 2) * 4
    boxes = torch.cat([corners, corners + sides], dim=1)
    boxes[1:9] = boxes[0]  # would be suppressed
    scores = torch.rand(40, 6).softmax(dim=1)
    classes = torch.randint(0, 5, (40,)) if given else None
    monkeypatch.setattr(predictor, "predict_probs", lambda *_: [scores])
    monkeypatch.setattr(predictor, "predict_boxes", lambda *_: [boxes])
    monkeypatch.setattr(model.model.roi_heads, "predict_regions", lambda *_: None)
    found = model._score({}, (100, 100), Boxes(boxes), classes)
    thresh = predictor.test_score_thresh
    expected = reference_candidates(boxes, scores, classes, thresh, model.candidates)
    assert len(found) == len(expected) == 30
    assert found.scores.tolist() == [e[0] for e in expected]
    assert found.pred_classes.tolist() == [e[1] for e in expected]
    assert found.pred_boxes.tensor.tolist() == [e[2] for e in expected]


def test_error_names_the_config_key() -> None:
    cfg = config("rfcn", averaging=True)
    cfg.TEST.BOX_AVERAGING.VOTE_THRESH = 0.0
    with pytest.raises(ValueError, match=r"TEST.BOX_AVERAGING must have .* got 2, 1000 and 0.0"):
        build_model_with_tta(cfg, build_model(cfg))
