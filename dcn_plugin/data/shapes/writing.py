# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A split of a set on disk: images, labels of pixels, and annotations in COCO's format."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from iopath.common.file_io import file_lock
from portalocker import LockException
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .classes import NAMES
from .drawing import draw_image
from .polygons import mask_to_polygons
from .sets import ANNOTATIONS, IMAGES, LABELS, SPLITS, VERSION, Settings

MIN_IMAGES_FOR_WORKERS = 200  # images that this process draws faster than others that it must start
JPEG_QUALITY = 95  # of JPEG files


def generate_split(folder: Path, name: str, settings: Settings, split: str) -> None:
    """Makes a split if it is not there; several processes may ask for it at once.

    Args:
        folder: its folder, which gets images, labels and annotations.json.
        name: of the set.
        settings: of the set.
        split: train, val or test.

    Raises:
        OSError: if it cannot be written.
    """
    annotations = folder / ANNOTATIONS
    if not annotations.is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with file_lock(str(folder)):
                if not annotations.is_file():  # nobody else has made it meanwhile
                    _write(folder, name, settings, split)
        except LockException as error:
            raise OSError(
                f"{folder} could not be locked, so that one process alone makes it: does another "
                "still make it, an hour long? Or is its disk one without locks? Then set "
                "DETECTRON2_DATASETS to a folder of another"
            ) from error


class EncodedImages(Dataset[dict[str, Any]]):
    """The files of each image, and what is annotated in it."""

    def __init__(self, settings: Settings, split: str) -> None:
        """Keeps what it needs.

        Args:
            settings: of the set.
            split: train, val or test.
        """
        self.settings = settings
        self.split = split

    def __len__(self) -> int:
        """Returns how many images there are."""
        return getattr(self.settings, self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Draws an image, of random numbers that its split and number alone decide."""
        seed = [self.settings.seed, SPLITS.index(self.split), index]
        drawn = draw_image(self.settings, np.random.default_rng(seed))
        labels = np.zeros_like(drawn.instance_ids)
        annotations = []
        for number, kind in enumerate(drawn.classes):
            mask = drawn.instance_ids == number + 1
            labels[mask] = kind + 1
            annotations.append({"category_id": kind + 1, **_annotation(mask)})
        return {
            "image": _encode(".jpg", drawn.image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]),
            "labels": _encode(".png", labels, []),
            "annotations": annotations,
        }


def _write(folder: Path, name: str, settings: Settings, split: str) -> None:
    unfinished = folder.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        (unfinished / IMAGES).mkdir(parents=True)
        (unfinished / LABELS).mkdir()
        content = _write_images(unfinished, settings, split, f"drawing shapes_{name}_{split}")
        (unfinished / ANNOTATIONS).write_text(json.dumps(content))
        shutil.rmtree(folder, ignore_errors=True)  # of which somebody has deleted a part
        unfinished.replace(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_images(folder: Path, settings: Settings, split: str, said: str) -> dict[str, Any]:
    files = EncodedImages(settings, split)
    # macOS and Windows do not have sched_getaffinity.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    loader = DataLoader(
        files,
        batch_size=None,
        num_workers=0 if len(files) < MIN_IMAGES_FOR_WORKERS else min(cpus, 16),
        collate_fn=_identity,
        worker_init_fn=_disable_threads,
        generator=torch.Generator(),  # else it draws a number of the program's
    )
    images, annotations = [], []
    for index, found in enumerate(tqdm(loader, said, unit="image", mininterval=1)):
        stem = f"{index:06d}"
        (folder / IMAGES / f"{stem}.jpg").write_bytes(found["image"])
        (folder / LABELS / f"{stem}.png").write_bytes(found["labels"])
        size = {"height": settings.side, "width": settings.side}
        images.append({"id": index, "file_name": f"{stem}.jpg", **size})
        for annotation in found["annotations"]:
            own = {"id": len(annotations) + 1, "image_id": index}
            annotations.append({**own, **annotation})
    return {
        "info": {"description": said, "version": VERSION, "settings": asdict(settings)},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1 + kind, "name": name} for kind, name in enumerate(NAMES)],
    }


def _annotation(mask: np.ndarray) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": mask_to_polygons(mask),
    }


def _encode(suffix: str, image: np.ndarray, settings: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, image, settings)
    if not done:
        raise RuntimeError(f"OpenCV could not encode an image as {suffix}")
    return data.tobytes()


def _disable_threads(worker: int) -> None:
    cv2.setNumThreads(0)  # its threads do not survive in a process that was split off


def _identity(item: dict[str, Any]) -> dict[str, Any]:
    return item
