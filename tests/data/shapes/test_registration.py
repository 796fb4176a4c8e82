# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The sets in Detectron2's catalogue, as its mappers and evaluators see them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="the data sets are in Detectron2's catalogue")

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator

from dcn_plugin import add_dcn_config
from dcn_plugin.data import check_datasets
from dcn_plugin.data.shapes import NAMES, SETS, SPLITS, register_set
from dcn_plugin.evaluation import DetectionEvaluator, build_evaluator


@pytest.fixture
def few(tmp_path: Path) -> Iterator[str]:
    """A set of a few images, below tmp_path."""
    register_set(str(tmp_path), "few", replace(SETS["tiny"], train=4, val=2, test=2))
    yield "shapes_few"
    for split in SPLITS:
        DatasetCatalog.remove(f"shapes_few_{split}")
        MetadataCatalog.remove(f"shapes_few_{split}")


def test_all_sets_are_registered() -> None:
    names = {f"shapes_{name}_{split}" for name in SETS for split in SPLITS}
    assert names <= set(DatasetCatalog.list()) and len(names) == 12


@pytest.mark.parametrize("masks", ["polygon", "bitmask"])
def test_mapped_masks_boxes_and_labels_agree(few: str, masks: str) -> None:
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format=masks,
    )
    records = DatasetCatalog.get(f"{few}_train")
    assert len(records) == 4
    for record in records:
        mapped = mapper(record)
        instances, labels = mapped["instances"], mapped["sem_seg"]
        assert len(instances) == len(record["annotations"])
        polygons = instances.gt_masks
        boxes = polygons.get_bounding_boxes().tensor
        assert torch.equal(boxes, instances.gt_boxes.tensor)
        for kind, annotation in zip(instances.gt_classes, record["annotations"], strict=True):
            assert annotation["category_id"] == kind
            assert (labels == 1 + kind).any()


def test_metadata_serves_detection_and_segmentation(few: str) -> None:
    metadata = MetadataCatalog.get(f"{few}_val")
    assert metadata.thing_classes == list(NAMES)
    assert metadata.stuff_classes == ["background", *NAMES]
    DatasetCatalog.get(f"{few}_val")
    assert Path(metadata.json_file).is_file() and metadata.thing_classes == list(NAMES)


def config(few: str, architecture: str):
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 8, 9
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (f"{few}_train",), (f"{few}_val",)
    return cfg


@pytest.mark.parametrize(
    ("architecture", "evaluator"),
    [
        ("RFCN", DetectionEvaluator),
        ("GeneralizedRCNN", DetectionEvaluator),
        ("DeepLab", SemSegEvaluator),
        ("SemanticSegmentor", SemSegEvaluator),
    ],
)
def test_networks_are_evaluated_by_what_they_learn(
    few: str, architecture: str, evaluator: type, tmp_path: Path
) -> None:
    cfg = config(few, architecture)
    check_datasets(cfg, True)
    assert not (tmp_path / "shapes").exists()  # nothing is made to be checked
    DatasetCatalog.get(f"{few}_val")
    assert type(build_evaluator(cfg, f"{few}_val", str(tmp_path))) is evaluator


def test_truth_scores_all_pixels_right(few: str, tmp_path: Path) -> None:
    records = DatasetCatalog.get(f"{few}_val")
    cfg = config(few, "DeepLab")
    evaluator = build_evaluator(cfg, f"{few}_val", str(tmp_path / "out"))
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    evaluator.reset()
    for record in records:
        scores = torch.nn.functional.one_hot(mapper(record)["sem_seg"], 9).permute(2, 0, 1)
        evaluator.process([record], [{"sem_seg": scores.float()}])
    results = evaluator.evaluate()["sem_seg"]
    assert results["pACC"] == 100 and np.isfinite(results["mIoU"])


def test_a_folder_that_cannot_be_written_is_named(few: str, tmp_path: Path) -> None:
    (tmp_path / "shapes").write_text("a file where the folder should be")
    with pytest.raises(
        PermissionError, match=r"DATASETS.TRAIN: shapes_few_train is made in .*shapes"
    ):
        check_datasets(config(few, "RFCN"), True)


def test_a_set_that_is_made_needs_no_writing(few: str, monkeypatch) -> None:
    cfg = config(few, "RFCN")
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.get(name)
    monkeypatch.setattr("dcn_plugin.data.check._can_write", lambda folder: False)
    check_datasets(cfg, True)
    annotations = Path(MetadataCatalog.get(f"{few}_val").json_file)
    annotations.unlink()
    with pytest.raises(PermissionError, match="shapes_few_val is made in"):
        check_datasets(cfg, True)
    assert len(DatasetCatalog.get(f"{few}_val")) == 2 and annotations.is_file()


def test_a_set_of_another_user_is_named_before_the_training(few: str, monkeypatch) -> None:
    DatasetCatalog.get(f"{few}_train")
    place = Path(MetadataCatalog.get(f"{few}_val").json_file).parents[1]
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != place and access(path, mode))
    with pytest.raises(PermissionError, match="shapes_few_val is made in"):
        check_datasets(config(few, "RFCN"), True)


def test_without_opencv_everything_else_works() -> None:
    program = """
import sys
sys.modules["cv2"] = None
import dcn_plugin.data
from detectron2.data import DatasetCatalog
try:
    DatasetCatalog.get("shapes_tiny_train")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "shapes_tiny_train is drawn with OpenCV: pip install" in done.stdout, done.stderr


def test_the_number_of_classes_is_checked(few: str) -> None:
    cfg = config(few, "RFCN")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with pytest.raises(ValueError, match=r"MODEL.ROI_HEADS.NUM_CLASSES must be 8"):
        check_datasets(cfg, True)
