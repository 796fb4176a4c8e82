# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Shapes as Detectron2's catalogue, mapper and evaluators see them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog

from dcn_plugin import add_dcn_config
from dcn_plugin.data.shapes import NAMES, SETS, SPLITS, register_set, registration
from dcn_plugin.engine.config_checks import check_datasets
from dcn_plugin.evaluation import build_evaluator
from dcn_plugin.messages import UserError
from tests.datasets import unregister


@pytest.fixture
def few(tmp_path: Path) -> Iterator[str]:
    """Registers a set of a few images, below tmp_path; yields its name."""
    register_set(str(tmp_path), "few", replace(SETS["tiny"], train=4, val=2, test=2))
    yield "shapes_few"
    unregister("shapes_few_")


def test_all_sets_are_registered() -> None:
    names = {f"shapes_{name}_{split}" for name in SETS for split in SPLITS}
    assert names | {f"{name}_sem_seg" for name in names} <= set(DatasetCatalog.list())
    assert len(names) == 12


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
    sem_seg_records = DatasetCatalog.get(f"{few}_train_sem_seg")
    assert len(records) == 4
    for record, sem_seg_record in zip(records, sem_seg_records, strict=True):
        assert "sem_seg_file_name" not in record and "annotations" not in sem_seg_record
        for key in ("file_name", "image_id", "height", "width"):
            assert record[key] == sem_seg_record[key]
        instances, labels = mapper(record)["instances"], mapper(sem_seg_record)["sem_seg"]
        assert len(instances) == len(record["annotations"])
        boxes = instances.gt_masks.get_bounding_boxes().tensor
        assert torch.equal(boxes, instances.gt_boxes.tensor)
        for kind, annotation in zip(instances.gt_classes, record["annotations"], strict=True):
            assert annotation["category_id"] == kind
        classes = {0} | {1 + kind for kind in instances.gt_classes.tolist()}
        assert set(labels.unique().tolist()) == classes


def test_both_tasks_use_the_same_files(few: str, tmp_path: Path) -> None:
    DatasetCatalog.get(f"{few}_val")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    DatasetCatalog.get(f"{few}_val_sem_seg")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_metadata(few: str) -> None:
    detection = MetadataCatalog.get(f"{few}_val")
    sem_seg = MetadataCatalog.get(f"{few}_val_sem_seg")
    assert (detection.evaluator_type, sem_seg.evaluator_type) == ("coco", "sem_seg")
    DatasetCatalog.get(f"{few}_val")  # sets thing_classes again
    assert detection.thing_classes == list(NAMES) and detection.get("stuff_classes") is None
    DatasetCatalog.get(f"{few}_val_sem_seg")
    assert sem_seg.stuff_classes == ["background", *NAMES] and sem_seg.ignore_label == 255
    assert sem_seg.get("thing_classes") is None


def config(few: str, architecture: str) -> CfgNode:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 8, 9
    suffix = "_sem_seg" if architecture == "DeepLab" else ""
    cfg.DATASETS.TRAIN = (f"{few}_train{suffix}",)
    cfg.DATASETS.TEST = (f"{few}_val{suffix}",)
    return cfg


@pytest.mark.parametrize("architecture", ["RFCN", "DeepLab"])
def test_checking_generates_nothing(few: str, architecture: str, tmp_path: Path) -> None:
    check_datasets(config(few, architecture), True)
    assert not (tmp_path / "shapes").exists()


def test_ground_truth_has_full_accuracy(few: str, tmp_path: Path) -> None:
    cfg = config(few, "DeepLab")
    records = DatasetCatalog.get(*cfg.DATASETS.TEST)
    evaluator = build_evaluator(cfg, *cfg.DATASETS.TEST, str(tmp_path / "out"))
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    evaluator.reset()
    for record in records:
        scores = torch.nn.functional.one_hot(mapper(record)["sem_seg"], 9).permute(2, 0, 1)
        evaluator.process([record], [{"sem_seg": scores.float()}])
    results = evaluator.evaluate()["sem_seg"]
    assert results["pACC"] == results["mIoU"] == 100


def test_an_unwritable_folder_is_an_error(few: str, tmp_path: Path) -> None:
    (tmp_path / "shapes").write_text("a file where the folder should be")
    with pytest.raises(
        UserError, match=r"DATASETS.TRAIN: shapes_few_train is generated in .*shapes"
    ):
        check_datasets(config(few, "RFCN"), True)


def test_a_generated_set_may_be_read_only(few: str, monkeypatch) -> None:
    cfg = config(few, "RFCN")
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.get(name)
    monkeypatch.setattr("dcn_plugin.engine.config_checks.can_write", lambda folder: False)
    check_datasets(cfg, True)
    annotations = Path(MetadataCatalog.get(f"{few}_val").json_file)
    annotations.unlink()
    with pytest.raises(UserError, match="shapes_few_val is generated in"):
        check_datasets(cfg, True, stock_trainer=True)
    assert len(DatasetCatalog.get(f"{few}_val")) == 2 and annotations.is_file()


def test_a_folder_of_another_user_is_an_error_before_training(few: str, monkeypatch) -> None:
    DatasetCatalog.get(f"{few}_train")
    folder = Path(MetadataCatalog.get(f"{few}_val").json_file).parents[1]
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))
    with pytest.raises(UserError, match="shapes_few_val is generated in"):
        check_datasets(config(few, "RFCN"), True)


def test_opencv_is_needed_to_generate_only(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    for name in ("writing", "drawing", "polygons"):
        monkeypatch.delitem(sys.modules, f"dcn_plugin.data.shapes.{name}", raising=False)
    importlib.reload(registration)
    with pytest.raises(UserError, match="shapes_tiny_train is drawn with"):
        DatasetCatalog.get("shapes_tiny_train")


def test_the_number_of_classes_is_checked(few: str) -> None:
    cfg = config(few, "RFCN")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    with pytest.raises(
        ValueError, match=r"MODEL.ROI_HEADS.NUM_CLASSES is 7, shapes_few_train in .* has 8 classes"
    ):
        check_datasets(cfg, True, stock_trainer=True)
