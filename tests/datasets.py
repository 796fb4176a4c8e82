# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Detectron2's catalogue on generated folders, in the place of the real ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.builtin import (
    register_all_cityscapes,
    register_all_coco,
    register_all_pascal_voc,
)

from dcn_plugin.data.voc import register_voc

REGISTER = (register_all_pascal_voc, register_all_cityscapes, register_all_coco, register_voc)
PREFIXES = ("voc_", "cityscapes_", "coco_", "keypoints_coco_")


@contextmanager
def data_sets_in(root: str) -> Iterator[None]:
    """Moves the built-in data sets below another folder, as DETECTRON2_DATASETS does."""
    _register_in(root)
    try:
        yield
    finally:
        _register_in("datasets")


def _register_in(root: str) -> None:
    for name in DatasetCatalog.list():
        if name.startswith(PREFIXES):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    for register in REGISTER:
        register(root)
