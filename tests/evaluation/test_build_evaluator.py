# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The evaluator follows from the data set's evaluator_type, as in Detectron2's train_net.py."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
)

from dcn_plugin import add_dcn_config
from dcn_plugin.evaluation import (
    DetectionEvaluator,
    MeanIoUEvaluator,
    NetworkSizeSemSegEvaluator,
    VOCEvaluator,
    at_network_size,
    build_evaluator,
)
from tests.datasets import data_sets_in, tiny_lvis, tiny_panoptic
from tests.tiny_voc import write_tiny_cityscapes, write_tiny_voc


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Registers generated VOC and Cityscapes."""
    folder = tmp_path_factory.mktemp("datasets")
    write_tiny_voc(folder)
    write_tiny_cityscapes(folder)
    with data_sets_in(str(folder)):
        DatasetCatalog.get("shapes_tiny_val")  # generates it
        yield folder


def config(**test: object) -> CfgNode:
    cfg = get_cfg()
    add_dcn_config(cfg)
    for key, value in test.items():
        cfg.TEST[key] = value
    return cfg


@pytest.mark.parametrize(
    ("name", "evaluator"),
    [
        ("tiny_coco", DetectionEvaluator),
        ("shapes_tiny_val", DetectionEvaluator),
        ("shapes_tiny_val_sem_seg", MeanIoUEvaluator),
        ("voc_2007_test", VOCEvaluator),
        ("cityscapes_fine_sem_seg_val", MeanIoUEvaluator),
        ("cityscapes_fine_instance_seg_val", CityscapesInstanceEvaluator),
    ],
)
@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "DeepLab", "PanopticFPN"])
def test_data_sets_have_their_evaluators(
    name: str, evaluator: type, architecture: str, tiny_coco: str, tmp_path: Path
) -> None:
    cfg = config()
    cfg.MODEL.META_ARCHITECTURE = architecture  # does not matter
    assert type(build_evaluator(cfg, name, str(tmp_path / "results"))) is evaluator


def test_panoptic_has_three_evaluators(tmp_path: Path) -> None:
    with tiny_panoptic(tmp_path / "data") as name:
        cfg = config(SEM_SEG_AT_NETWORK_SIZE=True)
        found = build_evaluator(cfg, name, str(tmp_path / "results"))
        assert type(found) is DatasetEvaluators
        assert [type(evaluator) for evaluator in found._evaluators] == [
            MeanIoUEvaluator,
            DetectionEvaluator,
            COCOPanopticEvaluator,
        ]
        assert not at_network_size(cfg, name)


@pytest.mark.skipif(find_spec("lvis") is None, reason="needs the lvis package, not in NumPy 2")
def test_lvis_has_its_evaluator(tmp_path: Path) -> None:
    with tiny_lvis(tmp_path / "data") as name:
        assert type(build_evaluator(config(), name, str(tmp_path / "results"))) is LVISEvaluator


@pytest.mark.parametrize(
    ("name", "evaluator"),
    [
        ("shapes_tiny_val", DetectionEvaluator),
        ("shapes_tiny_val_sem_seg", NetworkSizeSemSegEvaluator),
        ("cityscapes_fine_sem_seg_val", NetworkSizeSemSegEvaluator),
    ],
)
def test_network_size_is_for_semantic_segmentation(
    name: str, evaluator: type, tmp_path: Path
) -> None:
    cfg = config(SEM_SEG_AT_NETWORK_SIZE=True)
    assert type(build_evaluator(cfg, name, str(tmp_path / "results"))) is evaluator
    assert at_network_size(cfg, name) == (evaluator is NetworkSizeSemSegEvaluator)


def test_works_without_add_dcn_config(tmp_path: Path) -> None:
    evaluator = build_evaluator(get_cfg(), "shapes_tiny_val_sem_seg", str(tmp_path / "results"))
    assert type(evaluator) is MeanIoUEvaluator


def test_sigmas_of_keypoints_are_passed_on(tiny_coco: str, tmp_path: Path) -> None:
    cfg = config(KEYPOINT_OKS_SIGMAS=[0.1, 0.2])
    evaluator = build_evaluator(cfg, tiny_coco, str(tmp_path / "results"))
    assert evaluator._kpt_oks_sigmas == [0.1, 0.2]


def test_an_unknown_type_is_an_error(tmp_path: Path) -> None:
    DatasetCatalog.register("odd", list)
    MetadataCatalog.get("odd").evaluator_type = "depth"
    try:
        with pytest.raises(NotImplementedError, match="for odd, whose evaluator_type is 'depth'"):
            build_evaluator(config(), "odd", str(tmp_path))
        del MetadataCatalog.get("odd").evaluator_type
        with pytest.raises(NotImplementedError, match="whose evaluator_type is None"):
            build_evaluator(config(), "odd", str(tmp_path))
    finally:
        DatasetCatalog.remove("odd")
        MetadataCatalog.remove("odd")
