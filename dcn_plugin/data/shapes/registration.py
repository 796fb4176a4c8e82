# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Registers Shapes with Detectron2. The files are generated when a data set is first loaded."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from dcn_plugin.messages import UserError

from .classes import NAMES
from .sets import ANNOTATIONS, IMAGES, LABELS, SETS, SPLITS, Settings

FOLDER = "shapes"


def load_shapes(
    root: str, name: str, settings: Settings, split: str, sem_seg: bool = False
) -> list[dict[str, Any]]:
    """Loads a split in Detectron2's format, and generates its files if they do not exist.

    Args:
        root: folder of all data sets.
        name: of the set.
        settings: of the set.
        split: train, val or test.
        sem_seg: whether to load `sem_seg_file_name` instead of the annotations of objects.
    """
    try:
        from .writing import generate_split
    except ModuleNotFoundError as error:
        if error.name != "cv2":  # an optional dependency of Detectron2
            raise
        raise UserError(
            f"shapes_{name}_{split} is drawn with OpenCV: pip install opencv-python-headless"
        ) from error
    folder = split_folder(root, name, settings, split)
    generate_split(folder, name, settings, split)
    json_file, images = str(folder / ANNOTATIONS), str(folder / IMAGES)
    if not sem_seg:
        return load_coco_json(json_file, images, f"shapes_{name}_{split}")
    records = load_coco_json(json_file, images)
    for record in records:
        del record["annotations"]
        stem = Path(record["file_name"]).stem
        record["sem_seg_file_name"] = str(folder / LABELS / f"{stem}.png")
    return records


def split_folder(root: str, name: str, settings: Settings, split: str) -> Path:
    """Returns the folder of a split, which depends on the settings.

    Args:
        root: folder of all data sets.
        name: of the set.
        settings: of the set.
        split: train, val or test.
    """
    return Path(root, FOLDER, f"{name}-{settings.key()}", split)


def register_set(root: str, name: str, settings: Settings) -> None:
    """Registers a set as shapes_<name>_<split>, with objects, and shapes_<name>_<split>_sem_seg.

    Args:
        root: folder of all data sets.
        name: of the set.
        settings: how it is drawn.
    """
    for split in SPLITS:
        folder = split_folder(root, name, settings, split)
        load = partial(load_shapes, root, name, settings, split)
        paths = {
            "json_file": os.fspath(folder / ANNOTATIONS),
            "image_root": os.fspath(folder / IMAGES),
            "generated_in": os.path.join(root, FOLDER),  # generated there: its files may be missing
        }
        detection, sem_seg = f"shapes_{name}_{split}", f"shapes_{name}_{split}_sem_seg"
        DatasetCatalog.register(detection, load)
        MetadataCatalog.get(detection).set(
            thing_classes=list(NAMES),
            thing_dataset_id_to_contiguous_id={1 + kind: kind for kind in range(len(NAMES))},
            evaluator_type="coco",
            **paths,
        )
        DatasetCatalog.register(sem_seg, partial(load, sem_seg=True))
        MetadataCatalog.get(sem_seg).set(
            stuff_classes=["background", *NAMES],
            ignore_label=255,
            sem_seg_root=os.fspath(folder / LABELS),
            evaluator_type="sem_seg",
            **paths,
        )


def register_shapes(root: str) -> None:
    """Registers tiny, demo, hard and large.

    Args:
        root: folder of all data sets.
    """
    for name, settings in SETS.items():
        register_set(root, name, settings)
