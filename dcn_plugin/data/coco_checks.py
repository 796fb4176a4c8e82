# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of annotations in the formats of COCO and LVIS, as Detectron2 and their APIs read them.

Real files pass: crowds, boxes without width or height, and annotations of images that are
not in the file are at most warnings.
"""

from __future__ import annotations

import codecs
import gc
import json
import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from detectron2.utils.file_io import PathManager

from .faults import DataError, Faults, short

READ = ("segmentation", "keypoints")  # what annotations have beside boxes
LIMIT = 1e30  # of coordinates: beyond, float32 is infinite
NUMBERS = "finite numbers between -1e30 and 1e30"
NO_IMAGE_LEFT = (
    "training sets have no image left, none has an annotation that is not a crowd, or enough "
    "keypoints"
)
RLE_MASKS = "annotations have a segmentation in RLE, which needs INPUT.MASK_FORMAT bitmask"
BOMS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
Size = tuple[float, ...]  # height and width of an image, or empty


@dataclass(frozen=True)
class AnnotationUse:
    """How a file in COCO's or LVIS's format is used, on which depends what is a fault.

    Attributes:
        split: train, or test, which evaluation reads too.
        required: keys that annotations must have.
        read: those of segmentation and keypoints whose values are used: wrong ones of the others
            are warnings.
        filter_empty: whether images without annotations are left out of training.
        loaded: whether Detectron2 loads images from the file, or evaluates by it only.
        lvis: whether the format is that of LVIS: images have a `coco_url`, and all annotations
            polygons.
        unique_ids: whether ids of annotations must be unique.
        min_keypoints: number of visible keypoints, below which an image is left out of training.
        mask_format: INPUT.MASK_FORMAT, with which training reads the masks that are required; None
            if it is not known.
    """

    split: str
    required: Sequence[str] = ("bbox",)
    read: Container[str] = READ
    filter_empty: bool = True
    loaded: bool = True
    lvis: bool = False
    unique_ids: bool = True
    min_keypoints: int = 0
    mask_format: str | None = None


@contextmanager
def collection_paused() -> Iterator[None]:
    """Stops garbage collection, which visits new objects again and again: half of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def read_json(path: str) -> Any:
    """Reads a JSON file.

    Args:
        path: anything that PathManager opens.

    Raises:
        DataError: if it is not JSON in UTF-8; it names the line.
    """
    with PathManager.open(path, "rb") as file:
        data: bytes = file.read()
    if not data.strip():
        raise DataError(f"{path} must be JSON, but is empty")
    for mark, encoding in BOMS.items():
        if data.startswith(mark):
            raise DataError(
                f"{path} starts with a byte order mark (BOM) of {encoding}, JSON must not: save it "
                f"as UTF-8 without BOM, for example iconv -f {encoding} -t UTF-8 "
                "old.json | sed '1s/^\\xEF\\xBB\\xBF//' > new.json"
            )
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
        raise DataError(
            f"{path} must be UTF-8, got the byte 0x{data[error.start]:02X} in line {line}, "
            f"byte {column}"
        ) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path} must be JSON, got {error.msg} in {place}") from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise DataError(f"{path} must be JSON that Python can read, got: {error}") from error


def read_coco(path: str) -> dict[str, Any]:
    """Reads annotations in COCO's format.

    Args:
        path: anything that PathManager opens.

    Returns:
        the content, in which images, annotations and categories are lists of dicts if they exist.

    Raises:
        DataError: if that is not so.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(
            f"{path} must be in COCO's format, an object with lists of images, annotations and "
            f"categories, got a {type(content).__name__}"
        )
    for part in ("images", "annotations", "categories"):
        items = content.get(part, [])
        if not isinstance(items, list):
            raise DataError(
                f"{path} must be in COCO's format: {part} must be a list, got {short(items)}"
            )
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise DataError(
                    f"{path} must be in COCO's format: {part} must be objects, got {short(item)} "
                    f"at index {index}"
                )
    return content


def class_names(content: dict[str, Any], path: str) -> list[str]:
    """Returns the names of the categories in the order of their ids, as Detectron2 does.

    Args:
        content: of a file in COCO's format.
        path: of the file.

    Raises:
        DataError: if there are none, or they have no names or wrong ids.
    """
    faults = Faults()
    check_categories(content, faults)
    faults.raise_error(path)
    return [item["name"] for item in sorted(content["categories"], key=lambda item: item["id"])]


def check_categories(content: dict[str, Any], faults: Faults) -> set[int]:
    """Checks names and ids of the categories; returns the ids."""
    categories = content.get("categories", [])
    if not categories:
        faults.error("there are no categories, at least one is needed", "the file")
    seen: Counter[int] = Counter()
    names: set[str] = set()
    for index, item in enumerate(categories):
        place = f"categories[{index}]: {short(item)}"
        if not is_number(item.get("id")):
            faults.error("categories have an id that is not a number", place)
        else:
            seen[item["id"]] += 1
            if seen[item["id"]] > 1:
                faults.error("categories have the id of another one", place)
        if not isinstance(item.get("name"), str):
            kind = "no name" if item.get("name") is None else "a name that is not text"
            faults.error(f"categories have {kind}", place)
        elif item["name"] in names:
            faults.warning(
                "categories have the name of another one, whose metrics replace theirs", place
            )
        else:
            names.add(item["name"])
    return set(seen)


def check_images(
    content: dict[str, Any], faults: Faults, use: AnnotationUse
) -> dict[Any, dict[str, Any]]:
    """Checks the images, only their ids if they are not loaded; returns those with an id by it."""
    key = "coco_url" if use.lvis else "file_name"
    images: dict[Any, dict[str, Any]] = {}
    for index, item in enumerate(content.get("images", [])):
        place = f"images[{index}]"
        number = item.get("id")
        if not (is_number(number) or isinstance(number, str)):
            faults.error("images have an id that is neither a number nor text", place, item)
        elif number not in images:
            images[number] = item
        elif item == images[number]:
            faults.warning("images are listed twice", place, item)
        else:
            faults.error("images have the id of another one", place, item)
        if not use.loaded:
            continue
        name = item.get(key)
        if name is None or name == "":
            faults.error(f"images have no {key}", place, item)
        elif not isinstance(name, str) or "\0" in name:
            faults.error(
                f"images have a {key} that is not text, or has a NUL character", place, item
            )
        elif use.lvis and "/" not in name:
            faults.error("images have a coco_url that does not end in folder/file", place, item)
        if not (is_size(item.get("height")) and is_size(item.get("width"))):
            faults.error("images have no height and width, in whole pixels above 0", place, item)
    if len({isinstance(number, str) for number in images}) > 1:
        text = next(number for number in images if isinstance(number, str))
        faults.error("images have ids of mixed types", f"the file: text like {text!r}")
    return images


class AnnotationChecks:
    """Checks of one annotation after the other."""

    def __init__(
        self,
        use: AnnotationUse,
        images: dict[Any, dict[str, Any]],
        categories: Container[Any],
        faults: Faults,
    ) -> None:
        """Stores what annotations refer to.

        Args:
            use: of the file.
            images: by id.
            categories: ids.
            faults: where to add faults.
        """
        self.use, self.categories, self.faults = use, categories, faults
        self.testing = use.split == "test"
        self.required = ("bbox", "segmentation") if use.lvis else use.required
        self.sizes = {key: _size(item) for key, item in images.items()}
        self.ids: set[Any] = set()
        self.boxes = self.empty_boxes = 0
        self.labelled: set[Any] = set()  # images with an annotation that is not a crowd
        self.keypoints: Counter[Any] = Counter()  # visible ones, by image
        self.incomplete: list[tuple[int, dict[str, Any], str]] = []  # and the key that is absent
        self.encoded: list[tuple[int, dict[str, Any]]] = []  # masks in RLE, not of crowds

    def add(self, index: int, item: dict[str, Any]) -> None:
        """Checks an annotation, the one at `index` in the file."""
        self.current = index, item
        image, category, box = item.get("image_id"), item.get("category_id"), item.get("bbox")
        crowd = item.get("iscrowd", 0)
        size = self.sizes.get(image) if is_number(image) or isinstance(image, str) else None
        self._check_id(item, self.use.unique_ids and (self.testing or size is not None))
        if not is_number(category):
            self._error("annotations have a category_id that is not a number")
        elif size is not None and category not in self.categories:
            # COCO's API leaves them out.
            report = self._error if self.use.loaded else self._warning
            report("annotations have a category_id that is not in categories")
        if size is None:
            if is_number(image) or isinstance(image, str):
                self._warning(
                    "annotations are of an image_id that is not in images, and are ignored"
                )
            else:
                self._error("annotations have an image_id that is neither a number nor text")
            return
        if crowd not in (0, 1):
            self._error("annotations have an iscrowd that is neither 0 nor 1")
        elif not crowd:
            self.labelled.add(image)
        if self.use.loaded and item.get("ignore", 0) != 0:
            self._error('annotations have "ignore", which Detectron2 does not support')
        if box is not None or "bbox" in item:
            self._check_box(box, size)
        for key in self.required:
            absent = not item.get(key) and not (key == "bbox" and key in item)  # has its fault
            if absent and (self.testing or not crowd):
                self.incomplete.append((index, item, key))
        if self.testing and "area" in item and not (is_number(item["area"]) and item["area"] >= 0):
            self._error("annotations have an area that is not a number from 0 on")
        if isinstance(item.get("segmentation"), dict) and not crowd and not self.use.lvis:
            self.encoded.append((index, item))
        if item.get("segmentation"):
            self._check_segmentation(item["segmentation"], size)
        if item.get("keypoints"):
            points = item["keypoints"]
            if not isinstance(points, list) or len(points) % 3 or not are_finite(points):
                report = self._error if "keypoints" in self.use.read else self._warning
                report("annotations have keypoints that are not triples of numbers")
            elif self.use.min_keypoints:
                self.keypoints[image] += sum(visible > 0 for visible in points[2::3])

    def used_images(self) -> set[Any]:
        """Returns the ids of images that Detectron2 uses; adds what their annotations lack."""
        used = set(self.sizes)
        if not self.testing:
            used = self.labelled if self.use.filter_empty else used
            used = {image for image in used if self.keypoints[image] >= self.use.min_keypoints}
        for index, item, key in self.incomplete:
            if item["image_id"] in used:
                self.faults.error(f"annotations have no {key}", describe_annotation(index, item))
        masks = not self.testing and "segmentation" in self.required
        if masks and self.use.mask_format != "bitmask":
            report = self.faults.error if self.use.mask_format else self.faults.warning
            for index, item in self.encoded:
                if item["image_id"] in used:
                    report(RLE_MASKS, describe_annotation(index, item))
        return used

    def _error(self, kind: str) -> None:
        self.faults.error(kind, describe_annotation(*self.current))

    def _warning(self, kind: str) -> None:
        self.faults.warning(kind, describe_annotation(*self.current))

    def _check_id(self, item: dict[str, Any], unique: bool) -> None:
        number = item.get("id")
        if not (is_number(number) or (isinstance(number, str) and not self.testing)):
            self._error("annotations have an id that is not a number")
        elif unique and number in self.ids:
            self._error("annotations have the id of another one")
        else:
            self.ids.add(number)
            if number == 0 and self.testing:
                self._warning("annotations have the id 0, which COCO's evaluation never matches")

    def _check_box(self, box: Any, size: Size) -> None:
        self.boxes += 1
        is_list = isinstance(box, list) and len(box) in (4, 5) and bool not in map(type, box)
        if not is_list or not are_finite(box):
            self._error(f"annotations have a bbox that is not 4 {NUMBERS} (5 if rotated)")
            return
        x, y, width, height = box[:4]
        if width < 0 or height < 0:
            self._error("annotations have a bbox of negative width or height")
        elif width == 0 or height == 0:
            self.empty_boxes += 1
            self._warning(
                "annotations have a bbox without width or height, which "
                + ("no detection matches" if self.testing else "Detectron2 ignores"),
            )
        elif len(box) == 4 and (
            x + width <= 0 or y + height <= 0 or (size and (y >= size[0] or x >= size[1]))
        ):
            self._warning("annotations have a bbox outside the image")

    def _check_segmentation(self, value: Any, size: Size) -> None:
        report = self._error if "segmentation" in self.use.read or self.use.lvis else self._warning
        if isinstance(value, dict) and not self.use.lvis:
            fault = rle_fault(value, size)
            if fault:
                report(f"annotations have a segmentation whose {fault}")
        elif not isinstance(value, list) or not all(isinstance(p, list) for p in value):
            report("annotations have a segmentation that is not a list of lists")
        elif not all(map(are_finite, value)):
            report(f"annotations have a polygon that is not {NUMBERS}")
        elif any(len(polygon) % 2 or len(polygon) < 6 for polygon in value):
            if self.use.lvis:
                self._error("annotations have a polygon that is not 3 or more points")
            else:
                self._warning(
                    "annotations have a polygon that is not 3 or more points, and is ignored"
                )


def rle_fault(value: dict[str, Any], size: Size) -> str | None:
    """Returns what is wrong with a run-length encoded mask of an image."""
    counts = value.get("counts")
    if size and value.get("size") != list(size):
        return "RLE has another size than the image"
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts):
            return "RLE has counts that are not integers from 0 on"
        if size and sum(counts) != math.prod(size):
            return "RLE has counts that do not add up to the image's pixels"
    elif not isinstance(counts, str) or not counts:
        return "RLE has no counts"
    else:
        runs = decode_runs(counts)
        if runs is None or (runs < 0).any():
            return "RLE has counts that are not COCO's code of integers from 0 on"
        if size and runs.sum() != math.prod(size):
            return "RLE has counts that do not add up to the image's pixels"
    return None


def decode_runs(counts: str) -> np.ndarray | None:
    """Decodes the lengths of the runs of a compressed mask; pycocotools does not check its input.

    Each character has 5 bits of a number, lowest first, and a sixth that is set if more follow; the
    last one's fifth bit is the sign. From the fourth number on, the one two before is subtracted.

    Args:
        counts: of a compressed RLE.

    Returns:
        an array of int64, or None if the text is not in this code.
    """
    codes = np.array([ord(character) for character in counts]) - ord("0")
    ends = np.flatnonzero(codes < 32)
    if codes.min() < 0 or codes.max() >= 64 or not ends.size or ends[-1] != len(codes) - 1:
        return None
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits; pycocotools stores 32
        return None
    shifts = 5 * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & 31) << shifts, starts)
    runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    for first in (1, 2):
        runs[first::2] = runs[first::2].cumsum()
    return runs


def check_annotations(
    content: dict[str, Any], faults: Faults, use: AnnotationUse
) -> list[dict[str, Any]]:
    """Checks the content of a file in COCO's format; the files of images are not looked up.

    Args:
        content: as `read_coco` returns it.
        faults: where to add faults.
        use: of the file.

    Returns:
        the images that are used.
    """
    categories = check_categories(content, faults)
    images = check_images(content, faults, use)
    checks = AnnotationChecks(use, images, categories, faults)
    annotations = content.get("annotations", [])
    for index, item in enumerate(annotations):
        checks.add(index, item)
    used = checks.used_images()
    if not images:
        faults.error("there are no images, at least one is needed", "the file")
    elif not used:
        faults.error(
            NO_IMAGE_LEFT,
            f"the file: {len(images)} images, {len(annotations)} annotations",
        )
    elif annotations and not any(_is_key(a.get("image_id"), images) for a in annotations):
        faults.error(
            "annotations are of other images only",
            f"the file: image_id {short(annotations[0].get('image_id'))}, "
            f"images have ids like {short(next(iter(images)))}",
        )
    if checks.boxes and checks.empty_boxes == checks.boxes:
        faults.error("no annotation has a bbox with width and height", "the file")
    if checks.testing and annotations == [] and "annotations" in content:  # test-dev has no key
        faults.warning("there are no annotations to evaluate by", "the file")
    return [item for key, item in images.items() if key in used]


def describe_annotation(index: int, item: dict[str, Any]) -> str:
    """Returns what identifies an annotation, and its box."""
    keys = ("id", "image_id", "category_id", "iscrowd", "bbox", "area")
    values = ", ".join(f"{key} {short(item[key])}" for key in keys if key in item)
    return f"annotations[{index}]: {values}"


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite int or float, no bool."""
    return type(value) in (int, float) and -LIMIT < value < LIMIT


def is_size(value: Any) -> bool:
    """Returns whether a value is a number of pixels."""
    return is_number(value) and value > 0 and value == int(value)


def are_finite(values: Iterable[Any]) -> bool:
    """Returns whether all values are finite numbers, in float32 too; bools count as 0 and 1."""
    try:
        return math.hypot(*values) < LIMIT  # of no value less than its size
    except (OverflowError, TypeError, ValueError):  # of a huge int, or of what is no number
        return False


def _size(image: dict[str, Any]) -> Size:
    size = image.get("height"), image.get("width")
    return size if all(map(is_number, size)) else ()


def _is_key(value: Any, mapping: dict[Any, Any]) -> bool:
    return isinstance(value, int | float | str) and value in mapping
