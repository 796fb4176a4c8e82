# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of the files of a data set: whether they exist, can be read, and fit each other."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike
from PIL import ExifTags, Image

from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager

from dcn_plugin.messages import one_line

from .faults import DataError, Faults

# Keys of Detectron2's records that are files, and the metadata that name their folders.
FILES: dict[str, tuple[str, ...]] = {
    "file_name": ("image_root", "image_dir", "dirname"),
    "sem_seg_file_name": ("sem_seg_root", "gt_dir"),
    "pan_seg_file_name": ("panoptic_root",),
}
WIDE_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")  # of Pillow, with more than 8 bits
MAX_PATH = 1000  # characters in a message


def is_missing(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path does not exist; URLs pass, since not all handlers can tell."""
    path = os.fspath(path)
    return "://" not in path and not PathManager.exists(path)


def describe_missing(paths: Iterable[str]) -> str:
    """Returns that files of a data set do not exist, and where they are looked for, in one line."""
    return (
        f"missing {', '.join(paths)}. Detectron2 looks for data sets in DETECTRON2_DATASETS, now "
        f"{os.getenv('DETECTRON2_DATASETS', 'datasets')!r}; docs/data.md says where to get them"
    )


def check_files(paths: Iterable[str], faults: Faults, root: str | None, outside: bool) -> set[str]:
    """Checks that files exist, and are in a folder; returns those that do not exist.

    Args:
        paths: of the files.
        faults: where to add faults.
        root: the folder; with None or an empty text files may be anywhere.
        outside: whether files may be outside it.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if root and not outside and is_outside(root, path):
            faults.error(
                "files are outside the folder of the data set, which DATASETS.ALLOW_FILES_OUTSIDE "
                "allows",
                f"{repr(path)[:MAX_PATH]} and the folder {root}",
            )
        folder, name = os.path.split(path)
        folders[folder].append(name)
    missing = set()
    for folder, names in folders.items():
        present = _list_folder(folder)  # one call: a network takes a while for each
        for name in names:
            path = os.path.join(folder, name)
            if name not in present and "://" not in path and not PathManager.isfile(path):
                missing.add(path)
                faults.error("files do not exist, or are not regular files", repr(path)[:MAX_PATH])
    return missing


def _list_folder(folder: str) -> set[str]:
    if "://" in folder:
        return set()
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def is_outside(root: str, path: str) -> bool:
    """Returns whether a path is outside a folder, by its text: links in the folder may lead out."""
    inside = os.path.abspath(root).rstrip(os.sep) + os.sep
    return not os.path.abspath(path).startswith(inside)


def image_fault(record: Mapping[str, Any]) -> str | None:
    """Reads the image of a record; returns what is wrong with it, in one line.

    Args:
        record: in Detectron2's format.
    """
    path = record["file_name"]
    size, fault = _read_size(path)
    if fault:
        return fault
    expected = record.get("width", size[0]), record.get("height", size[1])
    if size != expected:
        turned = size == expected[::-1] and _is_turned(path)
        return (
            f"{path} has {size[0]} x {size[1]} pixels (width x height), but its annotation says "
            f"{expected[0]} x {expected[1]}"
            + ", as before the rotation in its EXIF data, which Detectron2 applies"
            * turned
        )
    return None


def clipped_fault(path: str) -> str | None:
    """Returns that Detectron2 reads other values than an image of 16 bits or more has, in one line.

    Args:
        path: of an image that can be read.
    """
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        if image.mode not in WIDE_MODES:
            return None
        values, read = np.asarray(image), np.asarray(image.convert("L"))
    if np.array_equal(values, read):
        return None
    at = tuple(np.argwhere(values != read)[0])
    return (
        f"{path} is an image of mode {image.mode}, which Detectron2 clips to integers from 0 "
        f"to 255: it reads {read[at]} for {values[at]:g}. Scale its values and save 8 bits"
    )


def label_map_fault(
    record: Mapping[str, Any],
    classes: int | None,
    ignore_label: int,
    splits: Container[str] = ("train", "test"),
) -> tuple[str | None, bool]:
    """Reads the label map of a record.

    Args:
        record: in Detectron2's format, with `sem_seg_file_name`.
        classes: number of classes, None if it is not known.
        ignore_label: label of pixels that do not count.
        splits: its uses, train (Detectron2's mapper reads its grey values) or test (its values).

    Returns:
        what is wrong with it, in one line; whether all its pixels are ignored.
    """
    path = record["sem_seg_file_name"]
    try:
        image = open_label_map(path)
        labels, greys = np.asarray(image), read_greys(image, path)
    except DataError as error:
        return str(error), False
    if labels.ndim != 2:
        fault = channels_fault(image, labels, greys if "test" not in splits else None, path)
        if fault:
            return fault, False
        labels = greys
    size, expected = labels.shape, (record.get("height"), record.get("width"))
    if None not in expected and size != expected:
        return (
            f"{path} has {size[1]} x {size[0]} pixels (width x height), but its image has "
            f"{expected[1]} x {expected[0]}"
        ), False
    fault = misread_fault(image, labels, greys, path) if "train" in splits else None
    if fault is None and classes is not None:
        fault = labels_fault(labels, path, classes, ignore_label)
    return fault, bool((labels == ignore_label).all())


def read_label_map(path: str, dtype: DTypeLike = None) -> np.ndarray:
    """Reads an image of labels.

    Args:
        path: of the file.
        dtype: of the result, by default that of the file.

    Raises:
        DataError: if it cannot be read.
    """
    return np.asarray(open_label_map(path), dtype=dtype)


def open_label_map(path: str) -> Image.Image:
    """Reads an image of labels; arguments and errors are those of `read_label_map`."""
    try:
        with PathManager.open(path, "rb") as file:
            image = Image.open(file)
            image.load()
    except Exception as error:  # Pillow raises many kinds
        raise DataError(f"{path} cannot be read as a label map: {_cause(error)}") from error
    return image


def read_greys(image: Image.Image, path: str) -> np.ndarray:
    """Returns what Detectron2's mapper reads from an image of labels.

    Args:
        image: of labels.
        path: of its file.

    Raises:
        DataError: if Pillow cannot convert it.
    """
    try:
        return np.asarray(image.convert("L"))
    except ValueError as error:
        raise DataError(f"{path} cannot be read as a label map: {_cause(error)}") from error


def channels_fault(
    image: Image.Image, labels: np.ndarray, greys: np.ndarray | None, path: str
) -> str | None:
    """Returns that an image has several channels, in one line; grey ones are one for a mapper.

    Args:
        image: of labels.
        labels: its values, of several channels.
        greys: what the mapper reads, None if it is not read by one.
        path: of its file.
    """
    if greys is not None and (np.asarray(image.convert("RGB")) == greys[..., None]).all():
        return None
    return f"{path} must be a label map of one channel, got {labels.shape[2]}"


def misread_fault(
    image: Image.Image, labels: np.ndarray, greys: np.ndarray, path: str
) -> str | None:
    """Returns that Detectron2's mapper reads other labels than an image has, in one line.

    Args:
        image: of labels.
        labels: its values, of one channel.
        greys: what the mapper reads.
        path: of its file.
    """
    if np.array_equal(labels, greys):
        return None
    at = tuple(np.argwhere(labels != greys)[0])
    kind = "a palette image" if image.mode == "P" else f"an image of mode {image.mode}"
    values = "indices" if image.mode == "P" else "values"
    return (
        f"{path} is {kind}, whose {values} Detectron2's mapper does not read: it reads the grey "
        f"value {greys[at]} for {int(labels[at])}. Save it in mode L, with labels from 0 to 255"
    )


def seen_fault(
    path: str, seen: np.ndarray, ignore_label: int, reads_greys: bool = False
) -> str | None:
    """Returns that a mapper has read the grey values of a label map, which are not its labels.

    Args:
        path: of the file.
        seen: labels that the mapper returned, perhaps of a part of the image.
        ignore_label: label of pixels that do not count, also of those that the mapper added.
        reads_greys: whether the mapper is known to read grey values, so that colours are a fault.
    """
    with PathManager.open(path, "rb") as file, Image.open(file) as header:
        if header.mode == "L":
            return None
    image = open_label_map(path)
    labels, greys = np.asarray(image), read_greys(image, path)
    if labels.ndim != 2:
        return channels_fault(image, labels, greys, path) if reads_greys else None
    added = [] if ignore_label in greys and ignore_label not in labels else [ignore_label]
    values = np.setdiff1d(seen, added)
    if np.isin(values, labels).all() or not np.isin(values, greys).all():
        return None
    return misread_fault(image, labels, greys, path)


def labels_fault(labels: np.ndarray, path: str, classes: int, ignore_label: int) -> str | None:
    """Returns what is wrong with the values of a label map, in one line.

    Args:
        labels: integers.
        path: of its file.
        classes: number of classes.
        ignore_label: label of pixels that do not count.
    """
    if labels.max(initial=0) < classes and labels.min(initial=0) >= 0:
        return None
    values, counts = np.unique(labels, return_counts=True)
    wrong = ((values < 0) | (values >= classes)) & (values != ignore_label)
    if not wrong.any():
        return None
    found = [f"{v} ({n} pixels)" for v, n in zip(values[wrong], counts[wrong], strict=True)]
    return (
        f"{path} must have labels from 0 to {classes - 1}, or {ignore_label} for pixels that do "
        f"not count, got {', '.join(found[:5])}"
    )


def _read_size(path: str) -> tuple[tuple[int, int], str | None]:
    """Returns width and height as the mapper sees them, or what prevents it from reading."""
    try:
        height, width = detection_utils.read_image(path, "RGB").shape[:2]
    except Exception as error:  # Pillow raises many kinds
        return (0, 0), f"{path} cannot be read as an image: {_cause(error)}"
    return (width, height), None


def _is_turned(path: str) -> bool:
    """Returns whether the EXIF data of an image say that it is shown with its sides exchanged."""
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) >= 5


def _cause(error: Exception) -> str:
    """Returns an error in one line, without the path that messages of the system repeat."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is empty, cut off or of an unknown format"
    return one_line(error) or type(error).__name__
