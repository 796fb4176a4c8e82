# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Custom data in COCO's format: what Detectron2 loads is accepted, other files are explained."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from dcn_plugin.data import add_custom_data_option, use_custom_data
from dcn_plugin.data.custom_coco import register_custom_data
from dcn_plugin.data.dataset_checks import find_faults
from tests.datasets import unregister
from tests.tiny_coco import write_json, write_tiny_coco


@pytest.fixture(autouse=True)
def _unregister() -> Iterator[None]:
    yield
    unregister("custom_")


def write(folder: Path, name: str = "data", **changed: object) -> list[str]:
    """Writes a data set, with some parts of its JSON changed; returns the two paths.

    A part that is changed to None is left out.
    """
    path = write_tiny_coco(folder / name, images=2)
    content = {**json.loads(path.read_text()), **changed}
    write_json(path, {key: value for key, value in content.items() if value is not None})
    return [str(path), str(path.parent)]


def used(**paths: list[str]) -> CfgNode:
    """Registers and checks data sets, as train_net.py does."""
    cfg = get_cfg()
    use_custom_data(cfg, **paths)
    for split in paths:
        find_faults(f"custom_{split}", split).raise_error(f"--{split}-data")
    return cfg


def test_options_and_config(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    for split in ("train", "test"):
        add_custom_data_option(parser, split)
    train, test = write(tmp_path, "a"), write(tmp_path, "b")
    args = parser.parse_args(["--train-data", *train, "--test-data", *test])
    cfg = used(train=args.train_data, test=args.test_data)
    assert cfg.DATASETS.TRAIN == ("custom_train",) and cfg.DATASETS.TEST == ("custom_test",)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == cfg.MODEL.RETINANET.NUM_CLASSES == 2
    for name in ("custom_train", "custom_test"):
        metadata = MetadataCatalog.get(name)
        assert metadata.thing_classes == ["disc", "square"] and metadata.evaluator_type == "coco"
        assert len(DatasetCatalog.get(name)) == 2


def test_one_split_alone(tmp_path: Path) -> None:
    paths = write(tmp_path)
    assert used(train=paths).DATASETS.TEST == ()
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("coco_2017_train",)
    use_custom_data(cfg, test=paths)
    assert cfg.DATASETS.TEST == ("custom_test",) and cfg.DATASETS.TRAIN == ("coco_2017_train",)


CATEGORY = {"id": 1, "name": "disc"}
IMAGE = {"id": 1, "file_name": "000.png", "height": 96, "width": 96}
LOST = {"id": 3, "file_name": "lost.png", "height": 96, "width": 96}
ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}


@pytest.mark.parametrize(
    ("split", "changed"),
    [
        ("test", {"annotations": None}),  # as COCO's test-dev
        ("test", {"annotations": []}),
        ("test", {"annotations": [ANNOTATION]}),  # without area and iscrowd
        ("train", {"annotations": [ANNOTATION]}),  # area and iscrowd are for evaluation
        ("train", {"images": [IMAGE, LOST], "annotations": [ANNOTATION]}),  # LOST is filtered out
        ("train", {"images": [IMAGE, IMAGE], "annotations": [ANNOTATION]}),
        (
            "train",
            {
                "categories": [
                    {"id": 7, "name": "b"},
                    {"id": 1, "name": "a"},
                    {"id": 2, "name": "c"},
                ]
            },
        ),
    ],
)
def test_what_detectron2_takes_is_accepted(split: str, changed: dict, tmp_path: Path) -> None:
    cfg = used(**{split: write(tmp_path, **changed)})
    assert len(DatasetCatalog.get(f"custom_{split}")) >= 1
    assert len(changed.get("categories", "ab")) == cfg.MODEL.ROI_HEADS.NUM_CLASSES


@pytest.mark.parametrize(
    ("split", "changed", "error"),
    [
        ("train", {"categories": [CATEGORY]}, "category_id that is not in categories.*id 2"),
        ("train", {"categories": []}, "there are no categories"),
        ("train", {"categories": None}, "there are no categories"),
        ("train", {"categories": [{"id": 1}, {"id": 2}]}, r"categories have no name \(2\)"),
        ("train", {"images": [{"id": 1, "file_name": "000.png"}]}, "images have no height and"),
        ("train", {"images": []}, "there are no images"),
        ("train", {"annotations": []}, "no image left"),
        ("train", {"annotations": [{"id": 1, "image_id": 1, "category_id": 1}]}, "have no bbox"),
        ("test", {"images": [IMAGE, LOST]}, r"files do not exist, .* \(1\): .*lost\.png"),
    ],
)
def test_what_fails_is_explained(split: str, changed: dict, error: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=f"--{split}-data: .*{error}"):
        used(**{split: write(tmp_path, **changed)})


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    for paths in (["none.json", str(tmp_path)], [write(tmp_path)[0], "none"]):
        with pytest.raises(FileNotFoundError, match="--test-data must be a JSON file and a folder"):
            used(test=paths)
    damaged = tmp_path / "data/annotations.json"
    damaged.write_text("{")
    with pytest.raises(
        ValueError, match=r"--train-data: .* must be JSON, got .* in line 1, column 2"
    ):
        used(train=[str(damaged), str(damaged.parent)])


def test_categories_must_agree(tmp_path: Path) -> None:
    train = write(tmp_path, "a")
    test = write(tmp_path, "b", categories=[CATEGORY, {"id": 2, "name": "cube"}])
    with pytest.raises(ValueError, match=r"same categories .* got \['disc', 'square'\] and"):
        used(train=train, test=test)


def test_a_folder_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--train-data must be .* got the folder .* as JSON"):
        register_custom_data("train", str(tmp_path), str(tmp_path))
