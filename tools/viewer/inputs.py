# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Images of a file, a folder, a video, or a data set in Detectron2's catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image

from dcn_plugin.messages import got

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
VIDEOS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg"}


@dataclass(frozen=True)
class Input:
    """An image."""

    name: str  # of the files that are written of it
    pixels: np.ndarray  # (height, width, 3) bytes, blue, green, red


def read_inputs(source: str, limit: int) -> Iterator[Input]:
    """Reads images.

    Args:
        source: a file or folder of images, a video, or the name of a data set.
        limit: of images; of a longer video those that divide it evenly.

    Yields:
        the images.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if the source is none of these.
    """
    taken: set[str] = set()
    for image in _read_any(source, limit):
        name, again = image.name, 1
        while name in taken:
            again += 1
            name = f"{image.name}_{again}"
        taken.add(name)
        yield Input(name, image.pixels)


def _read_any(source: str, limit: int) -> Iterator[Input]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
        if not files:
            raise FileNotFoundError(f"--input: there are no images in {path}")
        yield from (_read(file) for file in files[:limit])
    elif path.is_file() and path.suffix.lower() in VIDEOS:
        yield from _frames(path, limit)
    elif path.is_file():
        yield _read(path)
    elif source in DatasetCatalog.list():
        yield from (_read(Path(r["file_name"])) for r in DatasetCatalog.get(source)[:limit])
    else:
        raise ValueError(
            "--input must be an image, a folder, a video, or a data set of Detectron2's catalogue, "
            f"{got(source, DatasetCatalog.list())}"
        )


def _read(path: Path) -> Input:
    try:
        return Input(path.stem, read_image(str(path), "BGR"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"--input: {path} cannot be read as an image: {error}") from error


def _frames(path: Path, limit: int) -> Iterator[Input]:
    video = cv2.VideoCapture(str(path))
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    if count < 1:  # not in every kind of file
        count = limit
    wanted = set(np.linspace(0, count - 1, limit).round().astype(int).tolist())
    number, found = 0, False
    while max(wanted) >= number:
        there, pixels = video.read()
        if not there:
            break
        if number in wanted:
            found = True
            yield Input(f"{path.stem}_{number:06d}", pixels)
        number += 1
    video.release()
    if not found:
        raise OSError(f"--input: {path} cannot be read as a video")
