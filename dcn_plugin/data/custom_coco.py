# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Custom data sets in COCO's format, registered from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import filter_images_with_only_crowd_annotations
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from dcn_plugin.messages import MissingFileError, UserError

# Annotation keys that training and COCOeval require.
REQUIRED = {"train": ("bbox",), "test": ("bbox", "area", "iscrowd")}


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
        FileNotFoundError: if a file does not exist.
        ValueError: if training or evaluation would fail on a JSON file, or the categories differ.
    """
    classes = {
        split: _register(cfg, split, *paths)
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


def _register(cfg: CfgNode, split: str, json_file: str, image_root: str) -> list[str]:
    """Registers and checks a data set; returns its classes."""
    name, option = f"custom_{split}", f"--{split}-data"
    if is_missing(json_file) or is_missing(image_root):
        raise MissingFileError(
            f"{option} must be a JSON file and a folder of images, got {json_file} and {image_root}"
        )
    if name in DatasetCatalog.list():  # of an earlier call in this process
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, json_file, image_root)
    try:
        records = load_coco_json(json_file, image_root, name, extra_annotation_keys=["area"])
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{option}: {json_file} must be in COCO's format, with lists of images, annotations "
            f"and categories, but Detectron2 cannot load it: {type(error).__name__}: {error}"
        ) from error
    classes: list[str] = MetadataCatalog.get(name).thing_classes
    if not comm.is_main_process():  # has checked the files
        return classes
    if split == "train" and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = filter_images_with_only_crowd_annotations(records)
    if not records:
        raise UserError(f"{option}: {json_file} has no images to {split} on")
    for record in records:
        for annotation in record["annotations"]:
            missing = [key for key in REQUIRED[split] if key not in annotation]
            if missing:
                raise UserError(
                    f"{option}: annotations in {json_file} must have {', '.join(REQUIRED[split])}; "
                    f"one of image {record['image_id']} has no {', '.join(missing)}"
                )
    lost = [record["file_name"] for record in records if is_missing(record["file_name"])]
    if lost:
        raise MissingFileError(
            f"{option}: {len(lost)} of {len(records)} images in {json_file} do not exist, the "
            f"first is {lost[0]}"
        )
    return classes


def is_missing(path: str) -> bool:
    """Returns whether a path does not exist; URLs pass, since not all handlers can tell."""
    return "://" not in path and not PathManager.exists(path)
