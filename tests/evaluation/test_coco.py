# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""AP at 0.7 in COCO's evaluator, and which evaluator a data set gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="the evaluator is Detectron2's")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from dcn_plugin import add_dcn_config
from dcn_plugin.evaluation import DetectionEvaluator, build_evaluator


def evaluate(name: str, folder: Path, shift: float) -> dict[str, float]:
    """Evaluates the truth, moved to the right by a share of each box's width."""
    evaluator = DetectionEvaluator(name, output_dir=str(folder))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        boxes = torch.tensor([item["bbox"] for item in record["annotations"]]).float()
        boxes[:, 0] += shift * boxes[:, 2]
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances(
            (96, 96),
            pred_boxes=Boxes(boxes),
            pred_classes=torch.tensor([item["category_id"] for item in record["annotations"]]),
            scores=torch.linspace(0.9, 0.8, len(boxes)),
        )
        evaluator.process([record], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


@pytest.mark.parametrize(
    ("shift", "reached"),  # an IoU of (1 - s) / (1 + s)
    [(0.0, (50, 70, 75)), (0.16, (50, 70)), (0.2, (50,)), (0.4, ())],
)
def test_ap70_lies_between_its_neighbours(shift, reached, tiny_coco, tmp_path) -> None:
    found = evaluate(tiny_coco, tmp_path, shift)
    for overlap in (50, 70, 75):
        assert found[f"AP{overlap}"] == pytest.approx(100 if overlap in reached else 0), overlap


def test_an_unknown_kind_of_data_set_is_named(tmp_path) -> None:
    cfg = get_cfg()
    add_dcn_config(cfg)
    DatasetCatalog.register("odd", list)
    MetadataCatalog.get("odd").evaluator_type = "lvis"
    try:
        with pytest.raises(ValueError, match="got odd, whose evaluator_type is 'lvis'"):
            build_evaluator(cfg, "odd", str(tmp_path))
    finally:
        DatasetCatalog.remove("odd")
        MetadataCatalog.remove("odd")
