# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A data set in COCO's format, drawn on the spot: discs and squares on noise."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

CLASSES = ("disc", "square")


def draw_image(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[dict]]:
    """Draws one image with one or two objects; returns it with their boxes and classes."""
    image = rng.integers(0, 80, (size, size, 3), dtype=np.uint8)
    objects = []
    for _ in range(rng.integers(1, 3)):
        side = int(rng.integers(size // 5, size // 2))
        x, y = (int(value) for value in rng.integers(0, size - side, 2))
        kind = int(rng.integers(len(CLASSES)))
        colour = [int(value) for value in rng.integers(120, 256, 3)]
        if CLASSES[kind] == "disc":
            cv2.circle(image, (x + side // 2, y + side // 2), side // 2, colour, -1)
        else:
            cv2.rectangle(image, (x, y), (x + side, y + side), colour, -1)
        objects.append({"bbox": [x, y, side, side], "category_id": kind + 1})
    return image, objects


def write_tiny_coco(folder: Path, images: int, size: int = 96, seed: int = 0) -> Path:
    """Writes `images` PNGs and their annotations to `folder`; returns the JSON file."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    records, annotations = [], []
    for number in range(images):
        image, objects = draw_image(rng, size)
        name = f"{number:03d}.png"
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
    path = folder / "annotations.json"
    content = {
        "info": {},
        "images": records,
        "annotations": annotations,
        "categories": categories,
    }
    path.write_text(json.dumps(content))
    return path
