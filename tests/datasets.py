# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Detectron2's catalogue on generated folders, in the place of the real ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import (
    register_all_cityscapes,
    register_all_coco,
    register_all_pascal_voc,
)

from dcn_plugin.data.check import ROOT
from dcn_plugin.data.shapes import register_shapes
from dcn_plugin.data.voc import register_voc

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
    """Moves the built-in data sets below another folder, here and in programs that are started."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = root
    _register_in(root)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
        _register_in(ROOT)


def _register_in(root: str) -> None:
    for name in DatasetCatalog.list():
        if name.startswith(PREFIXES):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    for register in REGISTER:
        register(root)
