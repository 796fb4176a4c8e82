# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Reads images from a file, a folder, a video, or a registered data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image

from dcn_plugin.messages import UserError, got

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
VIDEOS = {".mp4", ".avi", ".mkv", ".mov", ".webm", ".mpg", ".mpeg"}


@dataclass(frozen=True)
class InputImage:
    """An image, and the stem of the files written for it."""

    name: str
    pixels: np.ndarray  # (H, W, 3) uint8 BGR


def comma_separated(text: str) -> list[str] | None:
    """Parses NAME,NAME; None if there is nothing."""
    return [name.strip() for name in text.split(",")] if text else None


def read_inputs(source: str, limit: int) -> Iterator[InputImage]:
    """Reads images.

    Args:
        source: a file or folder of images, a video, or the name of a data set.
        limit: maximum number of images; frames of a longer video are evenly spaced.

    Yields:
        the images, at least one, under different names.

    Raises:
        OSError: if a file is missing or cannot be read.
        ValueError: if the source is none of these, or an empty data set.
    """
    taken: set[str] = set()
    for image in _read_any(source, limit):
        name, again = image.name, 1
        while name in taken:
            again += 1
            name = f"{image.name}_{again}"
        taken.add(name)
        yield InputImage(name, image.pixels)
    if not taken:
        raise UserError(f"--input: there are no images in {source}")


def _read_any(source: str, limit: int) -> Iterator[InputImage]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
        yield from map(_read, files[:limit])
    elif path.is_file() and path.suffix.lower() in VIDEOS:
        yield from _frames(path, limit)
    elif path.is_file():
        yield _read(path)
    elif source in DatasetCatalog.list():
        yield from (_read(Path(r["file_name"])) for r in DatasetCatalog.get(source)[:limit])
    else:
        raise UserError(
            "--input must be an image, a folder, a video, or a registered data set, "
            f"{got(source, DatasetCatalog.list())}"
        )


def _read(path: Path) -> InputImage:
    try:
        return InputImage(path.stem, read_image(str(path), "BGR"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--input: {path} cannot be read as an image: {error}") from error


def _frames(path: Path, limit: int) -> Iterator[InputImage]:
    video = cv2.VideoCapture(str(path))
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
    if count < 1:  # some formats do not tell
        count = limit
    wanted = set(np.linspace(0, count - 1, limit).round().astype(int).tolist())
    any_frame = False
    for number in range(max(wanted) + 1):
        read, pixels = video.read()
        if not read:
            break
        if number in wanted:
            any_frame = True
            yield InputImage(f"{path.stem}_{number:06d}", pixels)
    video.release()
    if not any_frame:
        raise UserError(f"--input: {path} cannot be read as a video")
