# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Generated data sets in the formats of COCO, COCO keypoints, COCO panoptic and LVIS.

Discs and squares on noise, with boxes and polygons.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("disc", "square")
KEYPOINTS = 17  # as COCO's persons, so that its OKS sigmas apply
NOISE = 3  # category of the background in the panoptic data set


def draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[dict]]:
    """Draws one image with one or two objects; returns it with the objects' annotations."""
    image = rng.integers(0, 80, (size, size, 3), dtype=np.uint8)
    objects = []
    for _ in range(rng.integers(1, 3)):
        side = int(rng.integers(size // 5, size // 2))
        x, y = (int(value) for value in rng.integers(0, size - side, 2))
        kind = int(rng.integers(len(CLASSES)))
        colour = [int(value) for value in rng.integers(120, 256, 3)]
        if CLASSES[kind] == "disc":
            cv2.circle(image, (x + side // 2, y + side // 2), side // 2, colour, -1)
            polygon = points_on_circle(x, y, side, count=16)
        else:
            cv2.rectangle(image, (x, y), (x + side, y + side), colour, -1)
            polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
        bbox = [x, y, side, side]
        objects.append({"bbox": bbox, "category_id": kind + 1, "segmentation": [polygon]})
    return image, objects


def points_on_circle(x: int, y: int, diameter: int, count: int) -> list[float]:
    """Returns x and y of points clockwise from the top."""
    angles = 2 * np.pi * np.arange(count) / count
    points = np.stack([np.sin(angles), -np.cos(angles)], axis=1) + 1
    return (points * diameter / 2 + [x, y]).round(2).ravel().tolist()


def write_tiny_coco(
    folder: Path, images: int, size: int = 96, seed: int = 0, suffix: str = ".png"
) -> Path:
    """Writes `images` images and their annotations to `folder`; returns the JSON file."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records, annotations = [], []
    for number in range(images):
        image, objects = draw_image(rng, size)
        name = f"{number:03d}{suffix}"
        cv2.imwrite(str(folder / name), image)
        records.append({"id": number + 1, "file_name": name, "height": size, "width": size})
        for item in objects:
            annotations.append(
                {
                    **item,
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "area": item["bbox"][2] * item["bbox"][3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {
        "info": {},
        "images": records,
        "annotations": annotations,
        "categories": categories,
    }
    return write_json(folder / "annotations.json", content)


def write_json(path: Path, content: dict) -> Path:
    """Writes a JSON file; returns its path."""
    path.write_text(json.dumps(content))
    return path


def keypoint_metadata() -> dict:
    """Returns names and mirrored pairs of the keypoints, which go clockwise from the top."""
    names = [f"k{i}" for i in range(KEYPOINTS)]
    pairs = [(names[i], names[-i]) for i in range(1, KEYPOINTS // 2 + 1)]
    return {"thing_classes": ["person"], "keypoint_names": names, "keypoint_flip_map": pairs}


def write_tiny_keypoints(folder: Path, images: int) -> Path:
    """Writes a data set in the format of COCO's person keypoints; returns the JSON file."""
    path = write_tiny_coco(folder, images)
    content = json.loads(path.read_text())
    names = keypoint_metadata()["keypoint_names"]
    content["categories"] = [{"id": 1, "name": "person", "keypoints": names, "skeleton": []}]
    for item in content["annotations"]:
        x, y, side, _ = item["bbox"]
        points = np.array(points_on_circle(x, y, side - 1, KEYPOINTS)).reshape(-1, 2).round()
        visible = np.full((KEYPOINTS, 1), 2)
        visible[item["id"] % KEYPOINTS] = 1  # labelled, but not visible
        points = np.concatenate([points, visible], axis=1).astype(int)
        points[(item["id"] + 5) % KEYPOINTS] = 0  # not labelled
        item |= {"category_id": 1, "keypoints": points.ravel().tolist()}
        item["num_keypoints"] = KEYPOINTS - 1
    return write_json(path, content)


def write_tiny_lvis(root: Path, images: int) -> Path:
    """Writes images to `root`/train2017 and annotations as LVIS v1; returns the JSON file."""
    content = json.loads(write_tiny_coco(root / "train2017", images).read_text())
    for image in content["images"]:
        name = image.pop("file_name")
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{name}"
        image |= {"neg_category_ids": [3], "not_exhaustive_category_ids": []}
    for item in content["annotations"]:
        del item["iscrowd"]
    names = ("aerosol_can", "air_conditioner", "airplane")  # the first of LVIS v1
    content["categories"] = [
        {"id": i + 1, "name": name, "frequency": "rcf"[i]} for i, name in enumerate(names)
    ]
    return write_json(root / "lvis_v1_train.json", content)


def write_tiny_panoptic(root: Path, images: int) -> None:
    """Writes a panoptic data set below `root`, as Detectron2's Panoptic FPN reads it.

    images/ has the images and annotations.json of the things; panoptic/ with panoptic.json has the
    panoptic ground truth; sem_seg/ has labels: 0 for things, 1 for noise, the only stuff class.
    """
    content = json.loads(write_tiny_coco(root / "images", images, suffix=".jpg").read_text())
    for folder in ("panoptic", "sem_seg"):
        (root / folder).mkdir()
    annotations = []
    for image in content["images"]:
        objects = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        segments = np.zeros((image["height"], image["width"]), np.uint8)
        for number, item in enumerate(objects, start=1):  # later objects hide earlier ones
            polygon = np.array(item["segmentation"][0]).reshape(-1, 1, 2)
            cv2.fillPoly(segments, [polygon.round().astype(np.int32)], number)
        name = f"{Path(image['file_name']).stem}.png"
        categories = [NOISE, *(item["category_id"] for item in objects)]
        infos = [
            segment_info(segments == number, number + 1, category)
            for number, category in enumerate(categories)
            if (segments == number).any()
        ]
        # A segment's id is R + 256 G + 65536 B, and 0 is unlabelled; OpenCV writes BGR.
        encoded = np.stack([np.zeros_like(segments), np.zeros_like(segments), segments + 1], -1)
        cv2.imwrite(str(root / "panoptic" / name), encoded)
        cv2.imwrite(str(root / "sem_seg" / name), (segments == 0).astype(np.uint8))
        annotations.append({"image_id": image["id"], "file_name": name, "segments_info": infos})
    categories = [{**item, "isthing": 1} for item in content["categories"]]
    categories.append({"id": NOISE, "name": "noise", "isthing": 0})
    for number, category in enumerate(categories):
        category["color"] = [80 * number, 0, 0]
    content |= {"annotations": annotations, "categories": categories}
    write_json(root / "panoptic.json", content)


def segment_info(mask: np.ndarray, segment_id: int, category_id: int) -> dict:
    """Describes a segment of a panoptic image."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
    return {
        "id": segment_id,
        "category_id": category_id,
        "area": int(mask.sum()),
        "bbox": [x, y, width, height],
        "iscrowd": 0,
    }


def panoptic_metadata() -> dict:
    """Returns Detectron2's metadata of the panoptic data set."""
    return {
        "thing_classes": list(CLASSES),
        "thing_dataset_id_to_contiguous_id": {1: 0, 2: 1},
        "stuff_classes": ["things", "noise"],
        "stuff_dataset_id_to_contiguous_id": {0: 0, NOISE: 1},
    }
