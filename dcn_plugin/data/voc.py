# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""PASCAL VOC data sets that Detectron2 does not register: see `register_voc`."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import CLASS_NAMES, load_voc_instances
from detectron2.utils.file_io import PathManager

LABELS = "SegmentationClassAug"  # below VOC2012, written by tools/prepare_sbd.py


def load_voc_no_difficult(folder: str, split: str) -> list[dict[str, Any]]:
    """Loads a split as Detectron2 does, without the objects that are marked as difficult.

    Args:
        folder: VOC2007 or VOC2012.
        split: name of a list in ImageSets/Main.
    """
    records = load_voc_instances(folder, split, CLASS_NAMES)
    for record in records:
        path = os.path.join(folder, "Annotations", f"{record['image_id']}.xml")
        with PathManager.open(path) as file:
            objects = ElementTree.parse(file).findall("object")
        record["annotations"] = [
            annotation
            for annotation, item in zip(record["annotations"], objects, strict=True)
            if item.findtext("difficult", "0").strip() != "1"
        ]
    return records


def load_voc_sem_seg(folder: str, split: str) -> list[dict[str, Any]]:
    """Loads a split of VOC 2012 for semantic segmentation, with the labels of VOC and SBD.

    Args:
        folder: VOC2012.
        split: name of a list in ImageSets/Segmentation.
    """
    with PathManager.open(os.path.join(folder, "ImageSets", "Segmentation", f"{split}.txt")) as f:
        names = f.read().split()
    records = []
    for name in names:
        labels = os.path.join(folder, LABELS, f"{name}.png")
        with PathManager.open(labels, "rb") as file:
            width, height = Image.open(file).size
        records.append(
            {
                "file_name": os.path.join(folder, "JPEGImages", f"{name}.jpg"),
                "sem_seg_file_name": labels,
                "image_id": name,
                "height": height,
                "width": width,
            }
        )
    return records


def voc_colormap(count: int) -> list[tuple[int, int, int]]:
    """Returns VOC's RGB colours of labels, which spread a label's bits over the channels."""
    labels = np.arange(count)
    colours = np.zeros((count, 3), dtype=int)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (labels >> (3 * bit + channel) & 1) << (7 - bit)
    return [tuple(int(value) for value in colour) for colour in colours]


def register_voc(root: str) -> None:
    """Registers voc_<year>_<split>_no_difficult and voc_2012_sem_seg_<split> with Detectron2.

    Args:
        root: folder with VOC2007 and VOC2012.
    """
    for year in (2007, 2012):
        for split in ("trainval", "train", "val"):
            name, folder = f"voc_{year}_{split}_no_difficult", os.path.join(root, f"VOC{year}")
            DatasetCatalog.register(
                name, lambda folder=folder, split=split: load_voc_no_difficult(folder, split)
            )
            MetadataCatalog.get(name).set(
                thing_classes=list(CLASS_NAMES),
                dirname=folder,
                year=year,
                split=split,
                evaluator_type="pascal_voc",
            )
    folder = os.path.join(root, "VOC2012")
    for split in ("train_aug", "train", "val"):
        name = f"voc_2012_sem_seg_{split}"
        DatasetCatalog.register(name, lambda split=split: load_voc_sem_seg(folder, split))
        MetadataCatalog.get(name).set(
            stuff_classes=["background", *CLASS_NAMES],
            stuff_colors=voc_colormap(1 + len(CLASS_NAMES)),
            ignore_label=255,
            image_root=os.path.join(folder, "JPEGImages"),
            sem_seg_root=os.path.join(folder, LABELS),
            list_file=os.path.join(folder, "ImageSets", "Segmentation", f"{split}.txt"),
            evaluator_type="sem_seg",
        )
