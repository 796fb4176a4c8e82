# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Generated data sets, registered with Detectron2 while a test runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from pycocotools.coco import COCO

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import (
    register_coco_instances,
    register_coco_panoptic_separated,
    register_lvis_instances,
)
from detectron2.data.datasets.builtin import (
    register_all_cityscapes,
    register_all_coco,
    register_all_pascal_voc,
)

from dcn_plugin.data import ROOT
from dcn_plugin.data.shapes import register_shapes
from dcn_plugin.data.voc import register_voc
from tests.tiny_coco import (
    keypoint_metadata,
    panoptic_metadata,
    write_tiny_coco,
    write_tiny_keypoints,
    write_tiny_lvis,
    write_tiny_panoptic,
)

REGISTER = (
    register_all_pascal_voc,
    register_all_cityscapes,
    register_all_coco,
    register_voc,
    register_shapes,
)
PREFIXES = ("voc_", "cityscapes_", "coco_", "keypoints_coco_", "shapes_")
VARIABLE = "DETECTRON2_DATASETS"


@contextmanager
def data_sets_in(root: str) -> Iterator[None]:
    """Moves the built-in data sets to another folder, in this process and in its subprocesses."""
    with mock.patch.dict(os.environ, {VARIABLE: root}):
        _register_in(root)
        try:
            yield
        finally:
            _register_in(ROOT)


def _register_in(root: str) -> None:
    unregister(*PREFIXES)
    for register in REGISTER:
        register(root)


def unregister(*prefixes: str) -> None:
    """Removes the data sets whose names start with one of the prefixes."""
    for name in DatasetCatalog.list():
        if name.startswith(prefixes):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@contextmanager
def tiny_coco(folder: Path, images: int = 4) -> Iterator[str]:
    """Registers a data set with two classes, boxes and polygons; yields its name."""
    path = write_tiny_coco(folder, images)
    register_coco_instances("tiny_coco", {}, str(path), str(folder))
    try:
        yield "tiny_coco"
    finally:
        unregister("tiny_coco")


@contextmanager
def tiny_keypoints(folder: Path, images: int = 4) -> Iterator[str]:
    """Registers a data set with one class, boxes, polygons and 17 keypoints; yields its name."""
    path = write_tiny_keypoints(folder, images)
    register_coco_instances("tiny_keypoints", keypoint_metadata(), str(path), str(folder))
    try:
        yield "tiny_keypoints"
    finally:
        unregister("tiny_keypoints")


@contextmanager
def tiny_panoptic(folder: Path, images: int = 4) -> Iterator[str]:
    """Registers a panoptic data set with two thing classes and one stuff class; yields its name.

    The stuff classes are "things" and "noise": MODEL.SEM_SEG_HEAD.NUM_CLASSES is 2. The name with
    `_stuffonly` in place of `_separated` is a data set for semantic segmentation.
    """
    write_tiny_panoptic(folder, images)
    parts = ("images", "panoptic", "panoptic.json", "sem_seg", "images/annotations.json")
    paths = [str(folder / part) for part in parts]
    register_coco_panoptic_separated("tiny_panoptic", panoptic_metadata(), *paths)
    try:
        yield "tiny_panoptic_separated"
    finally:
        unregister("tiny_panoptic")


@contextmanager
def tiny_lvis(folder: Path, images: int = 4) -> Iterator[str]:
    """Registers a data set in the format of LVIS v1, with its 1203 classes; yields its name.

    Where the lvis package is not installed, a stand-in for its reader serves to train; evaluation
    needs the package.
    """
    path = write_tiny_lvis(folder, images)
    register_lvis_instances("lvis_v1_tiny", {}, str(path), f"{folder}/")
    modules = {} if find_spec("lvis") else {"lvis": _lvis_reader()}
    try:
        with mock.patch.dict(sys.modules, modules):
            yield "lvis_v1_tiny"
    finally:
        unregister("lvis_v1_tiny")


def _lvis_reader() -> ModuleType:
    """Returns what Detectron2 needs of the lvis package to load a data set."""

    class LVIS(COCO):
        def load_imgs(self, ids: list[int]) -> list[dict[str, Any]]:
            return self.loadImgs(ids)

        @property
        def img_ann_map(self) -> dict[int, list[dict[str, Any]]]:
            return self.imgToAnns

    module = ModuleType("lvis")
    module.LVIS = LVIS
    return module
