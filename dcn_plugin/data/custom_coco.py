# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Custom data sets in COCO's format, registered from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from dcn_plugin.messages import MissingFileError, UserError

from .coco_checks import class_names, collection_paused, read_coco
from .faults import DataError
from .file_checks import is_missing


def add_custom_data_option(parser: argparse.ArgumentParser, split: str) -> None:
    """Adds --train-data or --test-data to a command line.

    Args:
        parser: of the command line.
        split: train or test.
    """
    parser.add_argument(
        f"--{split}-data",
        nargs=2,
        metavar=("JSON", "IMAGES"),
        help=f"your own data to {split} on: annotations in COCO's format, and a folder of images",
    )


def use_custom_data(
    cfg: CfgNode, train: Sequence[str] | None = None, test: Sequence[str] | None = None
) -> None:
    """Registers custom_train and custom_test, and sets DATASETS and NUM_CLASSES for them.

    Args:
        cfg: changed in place. Without `test`, DATASETS.TEST is empty; without `train`,
            DATASETS.TRAIN stays.
        train: JSON file and folder of images; anything that PathManager opens.
        test: likewise.

    Raises:
        FileNotFoundError: if the JSON file or the folder does not exist.
        ValueError: if a file is not JSON, or lacks categories, or the categories differ. All other
            faults are found by `dataset_checks.find_faults`, which `check_config` calls.
    """
    classes = {
        split: register_custom_data(split, *paths)
        for split, paths in (("train", train), ("test", test))
        if paths
    }
    if len(classes) == 2 and classes["train"] != classes["test"]:
        raise UserError(
            "--train-data and --test-data must have the same categories in the order of their "
            f"ids, got {classes['train']} and {classes['test']}"
        )
    if train:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("custom_train",), ()
    if test:
        cfg.DATASETS.TEST = ("custom_test",)
    count = len(next(iter(classes.values())))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = count


def register_custom_data(split: str, json_file: str, image_root: str) -> list[str]:
    """Registers custom_<split>; returns its classes.

    Args:
        split: train or test.
        json_file: annotations in COCO's format.
        image_root: folder of images.

    Raises:
        FileNotFoundError: if one of them does not exist.
        DataError: if the file is not JSON, or lacks categories.
    """
    name, option = f"custom_{split}", f"--{split}-data"
    if is_missing(json_file) or is_missing(image_root):
        raise MissingFileError(
            f"{option} must be a JSON file and a folder of images, got {json_file} and {image_root}"
        )
    if "://" not in json_file and PathManager.isdir(json_file):
        raise UserError(
            f"{option} must be a JSON file and a folder of images, got the folder "
            f"{json_file} as JSON"
        )
    if name in DatasetCatalog.list():  # of an earlier call in this process
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, json_file, image_root)
    try:
        with collection_paused():
            classes = class_names(read_coco(json_file), json_file)
    except (DataError, OSError) as error:
        raise DataError(f"{option}: {error}") from error
    MetadataCatalog.get(name).thing_classes = classes
    return classes
