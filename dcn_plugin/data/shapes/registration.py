# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The sets in Detectron2's catalogue, where they are made when they are first asked for."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from .classes import NAMES
from .settings import ANNOTATIONS, IMAGES, LABELS, SETS, SPLITS, Settings

FOLDER = "shapes"


def load_shapes(folder: Path, name: str, settings: Settings, split: str) -> list[dict[str, Any]]:
    """Loads a split in Detectron2's format, and makes it before if it is not there.

    Args:
        folder: of all sets of this kind.
        name: of the set.
        settings: of the set.
        split: train, val or test.

    Returns:
        a record of each image, with boxes, masks and the file of its pixels' labels.
    """
    try:
        from .writing import ensure_split
    except ModuleNotFoundError as error:
        if error.name != "cv2":  # Detectron2 does without it
            raise
        raise ModuleNotFoundError(
            f"shapes_{name}_{split} is drawn with OpenCV: pip install opencv-python-headless"
        ) from error
    place = split_folder(folder, name, settings, split)
    ensure_split(place, name, settings, split)
    images, full_name = str(place / IMAGES), f"shapes_{name}_{split}"
    records = load_coco_json(str(place / ANNOTATIONS), images, full_name)
    for record in records:
        stem = Path(record["file_name"]).stem
        record["sem_seg_file_name"] = str(place / LABELS / f"{stem}.png")
    return records


def split_folder(folder: Path, name: str, settings: Settings, split: str) -> Path:
    """Returns where a split lies; with other settings it is another place.

    Args:
        folder: of all sets of this kind.
        name: of the set.
        settings: of the set.
        split: train, val or test.
    """
    return folder / f"{name}-{settings.key()}" / split


def register_set(root: str, name: str, settings: Settings) -> None:
    """Registers shapes_<name>_train, _val and _test with Detectron2.

    Args:
        root: of all data sets.
        name: of the set.
        settings: how it is drawn.
    """
    folder = Path(root, FOLDER)
    for split in SPLITS:
        full_name = f"shapes_{name}_{split}"
        DatasetCatalog.register(full_name, partial(load_shapes, folder, name, settings, split))
        place = split_folder(folder, name, settings, split)
        MetadataCatalog.get(full_name).set(
            thing_classes=list(NAMES),
            thing_dataset_id_to_contiguous_id={1 + kind: kind for kind in range(len(NAMES))},
            stuff_classes=["background", *NAMES],
            ignore_label=255,
            json_file=os.fspath(place / ANNOTATIONS),
            image_root=os.fspath(place / IMAGES),
            sem_seg_root=os.fspath(place / LABELS),
            evaluator_type="coco",
            made_in=os.fspath(folder),  # on first use: until then its files are not missed
        )


def register_shapes(root: str) -> None:
    """Registers tiny, demo, hard and large.

    Args:
        root: of all data sets.
    """
    for name, settings in SETS.items():
        register_set(root, name, settings)
