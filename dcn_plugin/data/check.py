# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Whether the data sets of a config are there, before anything is built."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from dcn_plugin.messages import got

ROOT = os.getenv("DETECTRON2_DATASETS", "datasets")  # where Detectron2 looks, too

# Attributes of Detectron2's metadata that are paths.
PATHS = (
    "json_file",
    "image_root",
    "image_dir",
    "gt_dir",
    "panoptic_root",
    "panoptic_json",
    "sem_seg_root",
    "list_file",
)
WHERE = {
    "coco_": "cocodataset.org",
    "voc_2012_sem_seg_": "host.robots.ox.ac.uk/pascal/VOC, and run tools/prepare_sbd.py",
    "voc_": "host.robots.ox.ac.uk/pascal/VOC",
    "cityscapes_": "cityscapes-dataset.com",
}
# The number of classes that a network has, and the names that its data set has.
CLASSES = {
    "GeneralizedRCNN": ("ROI_HEADS", "thing_classes"),
    "RFCN": ("ROI_HEADS", "thing_classes"),
    "CategoryAwareRPN": ("ROI_HEADS", "thing_classes"),
    "SemanticSegmentor": ("SEM_SEG_HEAD", "stuff_classes"),
    "DeepLab": ("SEM_SEG_HEAD", "stuff_classes"),
}
OTHER = {"thing_classes": "stuff_classes", "stuff_classes": "thing_classes"}


def learns_pixels(architecture: str) -> bool:
    """Returns whether a network is one of segmentation.

    Args:
        architecture: its MODEL.META_ARCHITECTURE.
    """
    return CLASSES.get(architecture, ("", ""))[1] == "stuff_classes"


def learns_boxes(architecture: str) -> bool:
    """Returns whether a network is one that learns boxes, and no labels of pixels.

    Args:
        architecture: its MODEL.META_ARCHITECTURE.
    """
    return CLASSES.get(architecture, ("", ""))[1] == "thing_classes"


def check_datasets(cfg: CfgNode, training: bool) -> None:
    """Looks for the data sets of a config, and for their proposals.

    Args:
        cfg: with DATASETS.
        training: whether those to train on are needed.

    Raises:
        FileNotFoundError: if files are missing; it says which, and where to get them.
        ValueError: if a name is unknown, or the numbers of classes differ.
    """
    if training and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN must name a data set, got none")
    if not training and not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST must name a data set, got none")
    for key in ("TRAIN", "TEST") if training else ("TEST",):
        names = cfg.DATASETS[key]
        for name in names:
            _check(name, f"DATASETS.{key}")
            _check_classes(cfg, name, f"DATASETS.{key}")
        if cfg.MODEL.LOAD_PROPOSALS:
            _check_proposals(cfg, key)


def missing_paths(name: str) -> list[str]:
    """Returns the files and folders that a data set lacks.

    Args:
        name: in Detectron2's catalogue.
    """
    metadata = MetadataCatalog.get(name)
    if metadata.get("made_in"):
        return []
    paths = [metadata.get(attribute) for attribute in PATHS]
    if metadata.get("evaluator_type") == "pascal_voc":
        folder = metadata.dirname
        paths += [os.path.join(folder, part) for part in ("Annotations", "JPEGImages")]
        paths.append(os.path.join(folder, "ImageSets", "Main", f"{metadata.split}.txt"))
    missing = [path for path in paths if path and not PathManager.exists(path)]
    if not missing and metadata.get("evaluator_type") == "cityscapes_sem_seg":
        labels = "*_gtFine_labelTrainIds.png"
        if next(Path(metadata.gt_dir).glob(f"*/{labels}"), None) is None:
            missing.append(os.path.join(metadata.gt_dir, "<city>", labels))
    return missing


def _check(name: str, key: str) -> None:
    known = DatasetCatalog.list()
    if name not in known:
        raise ValueError(f"{key} must name data sets of Detectron2's catalogue, {got(name, known)}")
    metadata = MetadataCatalog.get(name)
    to_be_made = metadata.get("made_in") and not PathManager.exists(metadata.json_file)
    if to_be_made and not _can_write(Path(metadata.json_file).parents[1]):
        raise PermissionError(
            f"{key}: {name} is made in {metadata.made_in} when it is first used, where nothing can "
            "be written; the built-in data sets lie in DETECTRON2_DATASETS"
        )
    missing = missing_paths(name)
    if missing:
        where = [address for prefix, address in WHERE.items() if name.startswith(prefix)]
        raise FileNotFoundError(
            f"{key}: {name} is not complete, there is no {', no '.join(missing)}. Data sets are "
            f"looked for in DETECTRON2_DATASETS, now {ROOT!r}; docs/data.md says how they lie there"
            + (f", get it from {where[0]}" if where else "")
        )


def _can_write(folder: Path) -> bool:
    """Returns whether a folder can be made and written."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _check_classes(cfg: CfgNode, name: str, key: str) -> None:
    if cfg.MODEL.META_ARCHITECTURE not in CLASSES:
        return
    section, attribute = CLASSES[cfg.MODEL.META_ARCHITECTURE]
    metadata = MetadataCatalog.get(name)
    classes, other = metadata.get(attribute), OTHER[attribute]
    if classes is None and metadata.get(other) is not None:
        raise ValueError(
            f"{key} must name data sets with {attribute} for {cfg.MODEL.META_ARCHITECTURE}, got "
            f"{name}, which has {other}"
        )
    if classes is not None and len(classes) != cfg.MODEL[section].NUM_CLASSES:
        raise ValueError(
            f"MODEL.{section}.NUM_CLASSES must be {len(classes)}, the classes of {name} in {key}, "
            f"got {cfg.MODEL[section].NUM_CLASSES}"
        )


def _check_proposals(cfg: CfgNode, key: str) -> None:
    names, files = cfg.DATASETS[key], cfg.DATASETS[f"PROPOSAL_FILES_{key}"]
    if len(names) != len(files):
        raise ValueError(
            f"DATASETS.PROPOSAL_FILES_{key} must name a file for each of the {len(names)} "
            f"data sets in DATASETS.{key}, got {len(files)}"
        )
    for file in files:
        if "://" not in file and not PathManager.isfile(file):
            raise FileNotFoundError(
                f"DATASETS.PROPOSAL_FILES_{key}: there is no {file}; tools/dump_proposals.py "
                "writes such files"
            )
