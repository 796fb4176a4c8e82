# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of annotations in PASCAL VOC's format, as Detectron2 reads them."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence

from detectron2.utils.file_io import PathManager

from dcn_plugin.messages import got

from .coco_checks import NUMBERS, is_number
from .faults import Faults, short
from .file_checks import check_files

SIDES = ("xmin", "ymin", "xmax", "ymax")


def check_voc(
    folder: str,
    split: str,
    classes: Sequence[str],
    faults: Faults,
    outside: bool = False,
    testing: bool = False,
) -> None:
    """Checks the list, the XML files, and that the images exist; addresses are not read.

    Args:
        folder: VOC2007 or VOC2012.
        split: name of a list in ImageSets/Main.
        classes: names.
        faults: where to add faults.
        outside: whether the list may name files outside the folder.
        testing: whether the split is evaluated, which reads difficult and truncated as numbers.
    """
    if "://" in folder:
        return
    names = _read_list(os.path.join(folder, "ImageSets", "Main", f"{split}.txt"), faults)
    images = [os.path.join(folder, "JPEGImages", f"{name}.jpg") for name in names]
    files = [os.path.join(folder, "Annotations", f"{name}.xml") for name in names]
    check_files(images, faults, os.path.join(folder, "JPEGImages"), outside)
    missing = check_files(files, faults, os.path.join(folder, "Annotations"), outside)
    boxes = [
        is_empty
        for path in dict.fromkeys(files)
        if path not in missing
        for is_empty in _check_annotation(path, classes, faults, testing)
    ]
    if boxes and all(boxes):
        faults.error("splits have no box with width and height", split)


def _read_list(path: str, faults: Faults) -> list[str]:
    with PathManager.open(path, "rb") as file:
        lines = file.read().decode(errors="replace").splitlines()
    names = []
    for number, line in enumerate(lines, start=1):
        words = line.split("#")[0].split()  # as numpy.loadtxt
        if len(words) > 1:
            faults.error(
                "lines of a list have more than the name of an image",
                f"{path}, line {number}: {short(line)}",
            )
        names += words[:1]
    for name, count in Counter(names).items():
        if count > 1:
            faults.warning(
                "lists name an image more than once, which counts as often",
                f"{path}: {short(name)}",
            )
    if len(names) < 2:
        faults.error("lists have fewer than the two images that Detectron2 needs", path)
    return names


def _check_annotation(
    path: str, classes: Sequence[str], faults: Faults, testing: bool
) -> list[bool]:
    """Checks an XML file; returns for each box whether it has no width or height."""
    try:
        with PathManager.open(path) as file:
            tree = ElementTree.parse(file)
    except (OSError, ElementTree.ParseError, UnicodeDecodeError) as error:
        faults.error("files cannot be read as XML", f"{path}: {error}")
        return []
    if not all(_is_size(tree.findtext(f"./size/{side}")) for side in ("width", "height")):
        faults.error("files have no size of the image, in whole pixels above 0", path)
    return [
        _check_object(item, f"{path}, object {number}", classes, faults, testing)
        for number, item in enumerate(tree.findall("object"), start=1)
    ]


def _check_object(
    item: ElementTree.Element, place: str, classes: Sequence[str], faults: Faults, testing: bool
) -> bool:
    """Checks an object; returns whether its box has no width or height."""
    name = item.findtext("name")
    if name not in classes:
        faults.error("objects have an unknown class", f"{place}: {got(name, classes)}")
    for flag in ("difficult", "truncated"):
        text = (item.findtext(flag) or "").strip()
        if text and not _is_whole(text):
            report = faults.error if testing else faults.warning  # training does not read it
            report(f"objects have a {flag} that is neither 0 nor 1", f"{place}: {short(text)}")
    texts = [item.findtext(f"bndbox/{side}") for side in SIDES]
    values = [_number(text) for text in texts]
    place = f"{place}: {', '.join(f'{s} {short(t)}' for s, t in zip(SIDES, texts, strict=True))}"
    if not all(map(is_number, values)):
        faults.error(f"objects have a bndbox that is not 4 {NUMBERS}", place)
        return False
    width, height = values[2] - values[0] + 1, values[3] - values[1] + 1  # both ends inclusive
    if width < 0 or height < 0:
        faults.error("objects have a bndbox whose maximum is below its minimum", place)
    elif width == 0 or height == 0:
        faults.warning("objects have a bndbox without width or height, and are ignored", place)
    return width == 0 or height == 0


def _is_size(text: str | None) -> bool:
    """Returns whether Detectron2 can read a number of pixels, with `int`."""
    return text is not None and _is_whole(text) and int(text) > 0


def _is_whole(text: str) -> bool:
    """Returns whether text is an integer for Detectron2, which reads it with `int`."""
    try:
        int(text)
    except ValueError:
        return False
    return True


def _number(text: str | None) -> float:
    """Returns a number, NaN for other text."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")
