# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""PASCAL VOC without difficult objects, and for semantic segmentation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import prepare_sbd
import pytest

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES

from dcn_plugin.data.voc import voc_colormap
from tests.datasets import data_sets_in
from tests.tiny_voc import draw_labels, write_tiny_sbd, write_tiny_voc


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Registers generated VOC 2007 and 2012."""
    write_tiny_voc(tmp_path)
    with data_sets_in(str(tmp_path)):
        yield tmp_path


def test_difficult_objects_are_left_out(root: Path) -> None:
    whole = DatasetCatalog.get("voc_2007_trainval")
    easy = DatasetCatalog.get("voc_2007_trainval_no_difficult")
    assert [record["image_id"] for record in easy] == [record["image_id"] for record in whole]
    assert any(len(record["annotations"]) == 2 for record in whole)
    for record, other in zip(easy, whole, strict=True):
        assert record["annotations"] == other["annotations"][:1]  # the second is difficult
    metadata = MetadataCatalog.get("voc_2007_trainval_no_difficult")
    assert metadata.thing_classes == list(CLASS_NAMES) and metadata.evaluator_type == "pascal_voc"


def test_sem_seg_has_labels_of_voc_and_sbd(root: Path) -> None:
    labels = write_tiny_sbd(root / "sbd", root / "VOC2012")
    prepare_sbd.prepare(root / "sbd", root / "VOC2012")
    for split, size in (("train_aug", 4), ("train", 2), ("val", 2)):
        assert len(DatasetCatalog.get(f"voc_2012_sem_seg_{split}")) == size
    record = DatasetCatalog.get("voc_2012_sem_seg_train_aug")[2]
    assert record["image_id"] == "2012_000002" and record["height"] == record["width"] == 96
    mapper = DatasetMapper(is_train=True, augmentations=[], image_format="BGR")
    mapped = mapper(record)
    assert mapped["image"].shape == (3, 96, 96)
    assert np.array_equal(mapped["sem_seg"].numpy(), labels["2012_000002"])
    # VOC's own files have a palette; the model is trained on class ids.
    labels_of_voc = mapper(DatasetCatalog.get("voc_2012_sem_seg_val")[0])["sem_seg"]
    assert set(labels_of_voc.unique().tolist()) <= {0, 3, 7, 255}


def test_classes_and_colours() -> None:
    metadata = MetadataCatalog.get("voc_2012_sem_seg_val")
    assert len(metadata.stuff_classes) == len(metadata.stuff_colors) == 21
    assert metadata.stuff_classes[:2] == ["background", "aeroplane"]
    # From VOC's development kit.
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    assert {label: voc_colormap(21)[label] for label in known} == known


def test_generated_labels_have_ignored_borders() -> None:
    found = draw_labels([{"bbox": [10, 20, 30, 40], "category_id": 1}], (3, 7), 0)
    assert set(np.unique(found)) == {0, 3, 255} and found[30, 20] == 3 and found[20, 10] == 255


def test_the_root_may_be_below_home(tmp_path: Path) -> None:
    # In another process: data sets are registered once.
    code = "from detectron2.data import MetadataCatalog as m; import dcn_plugin.data; "
    code += "print(m.get('voc_2007_train_no_difficult').dirname)"
    home = {"HOME": str(tmp_path), "DETECTRON2_DATASETS": "~/datasets"}
    command = [sys.executable, "-c", code]
    out = subprocess.check_output(command, env={**os.environ, **home}, text=True)
    assert out.strip() == str(tmp_path / "datasets/VOC2007")
