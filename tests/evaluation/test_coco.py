# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""AP at IoU 0.7 in COCO's evaluator, which evaluates boxes, masks and keypoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from dcn_plugin.evaluation import DetectionEvaluator
from tests.datasets import tiny_coco as registered_coco
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


def test_area_and_iscrowd_have_defaults(tmp_path: Path) -> None:
    results = {}
    for kept in (True, False):
        with registered_coco(tmp_path / str(kept) / "data") as name:
            path = Path(MetadataCatalog.get(name).json_file)
            content = json.loads(path.read_text())
            del content["annotations"][0]["segmentation"]  # its area is that of the box
            for item in content["annotations"]:
                if kept and "segmentation" in item:
                    item["area"] = int(mask_of(item).sum())
                elif kept:
                    item["area"] = item["bbox"][2] * item["bbox"][3]
                else:
                    del item["area"], item["iscrowd"]
            path.write_text(json.dumps(content))
            evaluator = DetectionEvaluator(name, output_dir=str(tmp_path))
            annotations = evaluator._coco_api.anns.values()
            results[kept] = [(item["area"], item["iscrowd"]) for item in annotations]
    assert results[True] == results[False] and len(results[True]) > 4


def test_annotations_of_other_images_are_ignored(tmp_path: Path) -> None:
    with registered_coco(tmp_path / "data") as name:
        expected = evaluate(name, tmp_path)
        path = Path(MetadataCatalog.get(name).json_file)
        content = json.loads(path.read_text())
        other = {**content["annotations"][0], "id": 90, "image_id": 99}
        del other["area"]
        content["annotations"].append(other)
        path.write_text(json.dumps(content))
        results = evaluate(name, tmp_path)
        for kind in ("bbox", "segm"):
            assert results[kind] == pytest.approx(expected[kind], nan_ok=True)


def test_detections_that_are_not_finite_are_dropped(tiny_coco, tmp_path, caplog) -> None:
    def evaluate_with(extra: list[tuple[float, float]]) -> dict[str, float]:
        """Adds a detection for each (coordinate, score) to every image."""
        evaluator = DetectionEvaluator(tiny_coco, output_dir=str(tmp_path))
        evaluator.reset()
        for record in DatasetCatalog.get(tiny_coco):
            box = torch.tensor(record["annotations"][0]["bbox"]).float()
            box[2:] += box[:2]
            boxes = torch.stack([box, *(box.where(torch.arange(4) > 0, x) for x, _ in extra)])
            kind = record["annotations"][0]["category_id"]
            instances = Instances(
                (96, 96),
                pred_boxes=Boxes(boxes),
                pred_classes=torch.full((len(boxes),), kind),
                scores=torch.tensor([0.5, *(score for _, score in extra)]),
            )
            evaluator.process([record], [{"instances": instances}])
        return evaluator.evaluate()["bbox"]

    clean = evaluate_with([])
    assert clean["AP"] > 0 and "Dropped" not in caplog.text
    nan, inf = float("nan"), float("inf")
    assert evaluate_with([(nan, 0.9), (inf, 0.9), (1.0, nan), (1.0, inf)]) == pytest.approx(
        clean, nan_ok=True
    )
    assert "Dropped 16 detections with NaN or infinity" in caplog.text


def test_the_count_is_of_one_evaluation(tiny_coco, tmp_path, caplog) -> None:
    evaluator = DetectionEvaluator(tiny_coco, output_dir=str(tmp_path), distributed=False)
    record = DatasetCatalog.get(tiny_coco)[0]
    for scores, expected in ((torch.tensor([float("nan")]), 1), (torch.tensor([0.5]), 0)):
        caplog.clear()
        evaluator.reset()
        boxes, classes = Boxes(torch.ones(1, 4)), torch.zeros(1, dtype=torch.int64)
        found = Instances((96, 96), pred_boxes=boxes, pred_classes=classes, scores=scores)
        evaluator.process([record], [{"instances": found}])
        assert evaluator.dropped == expected
        evaluator.evaluate()
        assert ("Dropped" in caplog.text) == bool(expected)
