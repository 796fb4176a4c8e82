# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Generated data sets in the formats of VOC 2007, VOC 2012, SBD and Cityscapes."""

from __future__ import annotations

import json
from pathlib import Path
from xml.sax.saxutils import escape

import cv2
import numpy as np
from PIL import Image
from scipy.io import savemat

from tests.tiny_coco import draw_image

NAMES = ("bird", "car")  # VOC's classes of discs and squares
LABELS = (3, 7)  # their class ids in VOC's segmentation
STREETS = (13, 0)  # train ids of car and road in Cityscapes
SIZE = 96


def write_annotation(path: Path, objects: list[dict]) -> None:
    """Writes VOC's XML; the second object is marked as difficult."""
    parts = []
    for number, item in enumerate(objects):
        x, y, width, height = item["bbox"]
        parts.append(
            f"<object><name>{escape(NAMES[item['category_id'] - 1])}</name><pose>Left</pose>"
            f"<truncated>0</truncated><difficult>{int(number == 1)}</difficult><bndbox>"
            f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + width}</xmax>"
            f"<ymax>{y + height}</ymax></bndbox></object>"
        )
    path.write_text(
        f"<annotation><size><width>{SIZE}</width><height>{SIZE}</height><depth>3</depth></size>"
        + "".join(parts)
        + "</annotation>"
    )


def draw_labels(objects: list[dict], labels: tuple[int, int], background: int) -> np.ndarray:
    """Draws boxes as labels, with an ignored border."""
    drawn = np.full((SIZE, SIZE), background, np.uint8)
    for item in objects:
        x, y, width, height = item["bbox"]
        drawn[y : y + height, x : x + width] = 255
        drawn[y + 1 : y + height - 1, x + 1 : x + width - 1] = labels[item["category_id"] - 1]
    return drawn


def write_tiny_voc(root: Path) -> None:
    """Writes VOC2007 and VOC2012 below root, each with four images in trainval and two in test."""
    rng = np.random.default_rng(0)
    for year in (2007, 2012):
        folder = root / f"VOC{year}"
        for part in ("Annotations", "JPEGImages", "SegmentationClass"):
            (folder / part).mkdir(parents=True)
        for part in ("Main", "Segmentation"):
            (folder / "ImageSets" / part).mkdir(parents=True)
        names = [f"{year}_{number:06d}" for number in range(6)]
        for name in names:
            image, objects = draw_image(rng, SIZE)
            cv2.imwrite(str(folder / "JPEGImages" / f"{name}.jpg"), image)
            write_annotation(folder / "Annotations" / f"{name}.xml", objects)
            labels = Image.fromarray(draw_labels(objects, LABELS, 0), mode="P")
            labels.putpalette(list(range(256)) * 3)  # as VOC's files
            labels.save(folder / "SegmentationClass" / f"{name}.png")
        splits = {"trainval": names[:4], "train": names[:3], "val": names[3:4], "test": names[4:]}
        for split, members in splits.items():
            (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(members) + "\n")
        (folder / "ImageSets/Segmentation/train.txt").write_text("\n".join(names[:2]))
        (folder / "ImageSets/Segmentation/val.txt").write_text("\n".join(names[4:]))


def write_tiny_sbd(root: Path, voc: Path) -> dict[str, np.ndarray]:
    """Writes SBD of VOC 2012's images 1 to 4; returns its labels.

    Image 1 is in VOC's train too, image 4 in its val.
    """
    names = sorted(path.stem for path in (voc / "JPEGImages").iterdir())[1:5]
    (root / "dataset/cls").mkdir(parents=True)
    labels = {}
    for number, name in enumerate(names):
        labels[name] = np.full((SIZE, SIZE), 5 + number, np.uint8)
        content = {"Segmentation": labels[name], "CategoriesPresent": np.uint8([[5 + number]])}
        savemat(root / f"dataset/cls/{name}.mat", {"GTcls": content})
    (root / "dataset/train.txt").write_text("\n".join(names[:2]) + "\n")
    (root / "dataset/val.txt").write_text("\n".join(names[2:]) + "\n")
    return labels


def write_tiny_cityscapes(root: Path) -> None:
    """Writes four training and two validation images of a city."""
    rng = np.random.default_rng(1)
    for split, count in (("train", 4), ("val", 2)):
        images = root / "cityscapes/leftImg8bit" / split / "ulm"
        ground_truth = root / "cityscapes/gtFine" / split / "ulm"
        images.mkdir(parents=True), ground_truth.mkdir(parents=True)
        for number in range(count):
            name = f"ulm_{number:06d}_000019"
            image, objects = draw_image(rng, SIZE)
            cv2.imwrite(str(images / f"{name}_leftImg8bit.png"), image)
            labels = draw_labels(objects, STREETS, 10)  # sky
            for kind in ("labelTrainIds", "labelIds", "instanceIds"):
                cv2.imwrite(str(ground_truth / f"{name}_gtFine_{kind}.png"), labels)
            polygons = {"imgHeight": SIZE, "imgWidth": SIZE, "objects": []}
            (ground_truth / f"{name}_gtFine_polygons.json").write_text(json.dumps(polygons))
