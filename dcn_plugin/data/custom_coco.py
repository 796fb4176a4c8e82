# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A user's own data in COCO's format, by two paths on the command line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

NAMES = {"TRAIN": "own_train", "TEST": "own_test"}
# What Detectron2 reads of a file in COCO's format.
KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def add_own_data(parser: argparse.ArgumentParser, part: str) -> None:
    """Adds the option for data of one's own.

    Args:
        parser: of the command line.
        part: train or test.
    """
    parser.add_argument(
        f"--{part}-data",
        nargs=2,
        metavar=("JSON", "IMAGES"),
        help=f"your own data to {part}: annotations in COCO's format, and a folder of images",
    )


def use_own_data(
    cfg: CfgNode, train: Sequence[str] | None = None, test: Sequence[str] | None = None
) -> None:
    """Registers own data as own_train and own_test, and sets the config for them.

    Args:
        cfg: gets DATASETS and the number of classes.
        train: file of annotations and folder of images; None: not own.
        test: likewise.

    Raises:
        OSError: if a file or folder is not there.
        ValueError: if a file is not in COCO's format, or their categories differ.
    """
    categories: dict[str, list[str]] = {}
    for key, paths in (("TRAIN", train), ("TEST", test)):
        if paths:
            categories[key] = _register(NAMES[key], f"--{key.lower()}-data", *paths)
            cfg.DATASETS[key] = (NAMES[key],)
    if train and not test:
        cfg.DATASETS.TEST = ()
    if len(categories) == 2 and categories["TRAIN"] != categories["TEST"]:
        raise ValueError(
            "--train-data and --test-data must have the same categories in the same order of their "
            f"ids, got {categories['TRAIN']} and {categories['TEST']}"
        )
    count = len(next(iter(categories.values())))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = count


def _register(name: str, option: str, annotations: str, images: str) -> list[str]:
    content = _read(option, annotations, images)
    names = [item["name"] for item in sorted(content["categories"], key=lambda item: item["id"])]
    if name in DatasetCatalog.list():  # of an earlier call in this process
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {"thing_classes": names}, annotations, images)
    return names


def _read(option: str, annotations: str, images: str) -> dict[str, Any]:
    if not Path(annotations).is_file() or not Path(images).is_dir():
        raise FileNotFoundError(
            f"{option} must be a file of annotations and a folder of images, got {annotations} "
            f"and {images}"
        )
    try:
        content = json.loads(Path(annotations).read_bytes())
        lists = {key: content[key] for key in KEYS}
        for key, items in lists.items():
            for item in items:
                _ = [item[name] for name in KEYS[key]]
        if any(len(item["bbox"]) != 4 for item in content["annotations"]):
            raise TypeError("a bbox without four numbers")
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{option}: {annotations} is not in COCO's format, whose {_wanted()}: "
            f"{type(error).__name__}, {error}"
        ) from error
    ids = {key: [item["id"] for item in items] for key, items in lists.items()}
    for key, found in ids.items():
        if not found or len(set(found)) < len(found):
            raise ValueError(
                f"{option}: {annotations} must have {key}, each with an id of its own, got "
                f"{len(found)} with {len(set(found))} different ids"
            )
    unknown = {item["category_id"] for item in content["annotations"]} - set(ids["categories"])
    if unknown:
        raise ValueError(
            f"{option}: {annotations} has annotations of unknown categories {sorted(unknown)}"
        )
    lost = [
        i["file_name"] for i in content["images"] if not (Path(images) / i["file_name"]).is_file()
    ]
    if lost:
        raise FileNotFoundError(
            f"{option}: there is no {lost[0]} in {images}; {len(lost)} images are missing"
        )
    return content


def _wanted() -> str:
    return "; ".join(f"{key} have {', '.join(names)}" for key, names in KEYS.items())
