# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""AP at IoU 0.7 in COCO's evaluator, which evaluates boxes, masks and keypoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from dcn_plugin.evaluation import DetectionEvaluator
from tests.datasets import tiny_keypoints


def evaluate(name: str, folder: Path, shift: float = 0.0) -> dict[str, dict[str, float]]:
    """Evaluates the ground truth, with boxes moved to the right by a share of their width."""
    evaluator = DetectionEvaluator(name, output_dir=str(folder))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        objects = record["annotations"]
        boxes = torch.tensor([item["bbox"] for item in objects]).float()
        boxes[:, 0] += shift * boxes[:, 2]
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances(
            (96, 96),
            pred_boxes=Boxes(boxes),
            pred_classes=torch.tensor([item["category_id"] for item in objects]),
            pred_masks=torch.from_numpy(np.stack([mask_of(item) for item in objects])),
            scores=torch.linspace(0.9, 0.8, len(boxes)),
        )
        if "keypoints" in objects[0]:
            points = torch.tensor([item["keypoints"] for item in objects])
            instances.pred_keypoints = points.reshape(len(objects), -1, 3)
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()


def mask_of(item: dict) -> np.ndarray:
    return mask_util.decode(mask_util.frPyObjects(item["segmentation"], 96, 96))[..., 0] > 0


@pytest.mark.parametrize(
    ("shift", "reached"),  # an IoU of (1 - s) / (1 + s)
    [(0.0, (50, 70, 75)), (0.16, (50, 70)), (0.2, (50,)), (0.4, ())],
)
def test_ap70_lies_between_its_neighbours(shift, reached, tiny_coco, tmp_path) -> None:
    results = evaluate(tiny_coco, tmp_path, shift)
    for iou in (50, 70, 75):
        assert results["bbox"][f"AP{iou}"] == pytest.approx(100 if iou in reached else 0), iou
    assert results["segm"]["AP70"] == pytest.approx(100)  # the masks are not moved


def test_keypoints_are_evaluated_too(tmp_path: Path) -> None:
    with tiny_keypoints(tmp_path / "data") as name:
        results = evaluate(name, tmp_path / "results")
    assert results.keys() == {"bbox", "segm", "keypoints"}
    for metrics in results.values():
        assert metrics["AP50"] == metrics["AP75"] == pytest.approx(100)
