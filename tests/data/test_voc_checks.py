# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Faults in VOC's format: named with file and place, or accepted by Detectron2 as it is."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from detectron2.data import DatasetCatalog

from dcn_plugin.data.dataset_checks import find_faults
from dcn_plugin.data.faults import Faults
from dcn_plugin.data.voc_checks import check_voc
from tests.datasets import data_sets_in
from tests.tiny_voc import write_tiny_voc

NAME = "voc_2007_trainval"
FIRST = "2007_000000"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_tiny_voc(folder)
    return folder


@pytest.fixture
def voc(original: Path, tmp_path: Path) -> Iterator[Path]:
    """Registers a copy of VOC; yields the folder of VOC 2007."""
    shutil.copytree(original, tmp_path / "root")
    with data_sets_in(str(tmp_path / "root")):
        yield tmp_path / "root/VOC2007"


def replace(old: str, new: str) -> Callable[[Path], None]:
    """Returns a change of the first XML file."""

    def change(voc: Path) -> None:
        path = voc / f"Annotations/{FIRST}.xml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def write_list(text: str) -> Callable[[Path], object]:
    return lambda voc: (voc / "ImageSets/Main/trainval.txt").write_text(text)


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


ABSENT = r"files do not exist, or are not regular files \(1\)"
ERRORS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no XML": (lambda voc: (voc / f"Annotations/{FIRST}.xml").unlink(), ABSENT),
    "no JPEG": (lambda voc: (voc / f"JPEGImages/{FIRST}.jpg").unlink(), ABSENT),
    "FIFO": (lambda voc: make_fifo(voc / f"JPEGImages/{FIRST}.jpg"), ABSENT),
    "XML FIFO": (lambda voc: make_fifo(voc / f"Annotations/{FIRST}.xml"), ABSENT),
    "class": (replace("<name>", "<name>x"), r"objects have an unknown class .*object 1: got 'x"),
    "no class": (replace("<name>", "<nom>x</nom><!--"), "cannot be read as XML"),
    "text": (replace("</xmin>", "px</xmin>"), r"bndbox that is not 4 finite .* xmin '\d+px'"),
    "NaN": (replace("<xmin>", "<xmin>nan</xmin><xmin>"), "bndbox that is not 4 finite numbers"),
    "no side": (replace("ymax>", "y>"), "cannot be read as XML"),
    "no box": (replace("<bndbox>", "<bndbox/><box>"), "cannot be read as XML"),
    "reversed": (replace("<xmax>", "<xmax>-50</xmax><xmax>"), "maximum is below its minimum"),
    "malformed": (replace("</annotation>", ""), r"cannot be read as XML .*xml: no element found"),
    "not UTF-8": (
        lambda voc: (voc / f"Annotations/{FIRST}.xml").write_bytes(b"<annotation>\xe4"),
        "cannot be read as XML",
    ),
    "no size": (
        replace("<width>96</width><height>96</height>", ""),
        r"no size of the image, in whole pixels above 0 \(1\)",
    ),
    "size": (replace("<width>96<", "<width>many<"), "no size of the image"),
    "fractional size": (replace("<width>96<", "<width>96.0<"), "no size of the image"),
    "empty": (write_list("\n"), "lists have fewer than the two images"),
    "one image": (write_list(f"{FIRST}\n"), "lists have fewer than the two images"),
    "columns": (write_list(f"{FIRST} -1\n2007_000001 1\n"), r"more than the name .*line 1"),
    "outside": (
        write_list(f"../../../x/{FIRST}\n2007_000001\n"),
        "files are outside the folder of the data set",
    ),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("fault", ERRORS)
def test_faults_are_errors(fault: str, split: str, voc: Path) -> None:
    change, message = ERRORS[fault]
    change(voc)
    lines = find_faults(NAME, split).lines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert [line for line in errors if re.search(message, line)], errors
    assert [line for line in errors if FIRST in line or "trainval.txt" in line]


@pytest.mark.parametrize(
    "change",
    [
        lambda voc: None,
        replace("</xmin>", ".5</xmin>"),
        replace("<difficult>0</difficult>", ""),
        replace("<pose>Left</pose><truncated>0</truncated>", ""),
        write_list(f"{FIRST}\n\n  2007_000001  # the second\n"),
    ],
)
def test_what_detectron2_takes_passes(change: Callable, voc: Path) -> None:
    change(voc)
    assert find_faults(NAME, "train").lines() == []
    assert len(DatasetCatalog.get(NAME)) >= 2
    assert len(DatasetCatalog.get(f"{NAME}_no_difficult")) >= 2


@pytest.mark.parametrize(("flag", "value"), [("difficult", "yes"), ("truncated", "0.0")])
def test_flags_that_evaluation_cannot_read(flag: str, value: str, voc: Path) -> None:
    replace(f"<{flag}>0</{flag}>", f"<{flag}>{value}</{flag}>")(voc)
    (line,) = find_faults(NAME, "test").lines()
    assert line.startswith(f"error: objects have a {flag} that is neither 0 nor 1 (1): ")
    assert f"{FIRST}.xml, object 1: '{value}'" in line
    assert not find_faults(NAME, "train").errors


def test_an_image_that_is_listed_twice_is_a_warning(voc: Path) -> None:
    write_list(f"{FIRST}\n2007_000001\n{FIRST}\n")(voc)
    replace("<name>", "<name>x")(voc)
    error, warning = find_faults(NAME, "test").lines()
    assert "unknown class (1)" in error  # not twice
    assert warning.startswith("warning: lists name an image more than once") and FIRST in warning


def test_folders_at_an_address_are_not_read() -> None:
    faults = Faults()  # no handler knows the address: reading it would fail
    check_voc("s3://bucket/VOC2007", "trainval", ["car"], faults)
    assert faults.lines() == []


def test_boxes_without_width_are_a_warning_unless_all_are(voc: Path) -> None:
    replace("<xmin>", "<xmin>40</xmin><xmin>")(voc)
    replace("<xmax>", "<xmax>39</xmax><xmax>")(voc)
    (line,) = find_faults(NAME, "train").lines()
    assert line.startswith("warning: objects have a bndbox without width or height")
    for path in (voc / "Annotations").iterdir():
        text = path.read_text().replace("<xmin>", "<xmin>40</xmin><xmin>")
        path.write_text(text.replace("<xmax>", "<xmax>39</xmax><xmax>"))
    assert "no box with width and height" in find_faults(NAME, "train").lines()[0]


def test_semantic_segmentation_needs_its_files(voc: Path) -> None:
    root = voc.parent / "VOC2012"
    shutil.copytree(root / "SegmentationClass", root / "SegmentationClassAug")
    name = "voc_2012_sem_seg_train"
    assert find_faults(name, "train").lines() == []
    (root / "JPEGImages/2012_000001.jpg").unlink()
    (line,) = find_faults(name, "train").lines()
    assert (
        line.startswith("error: files do not exist, or are not regular files (1)")
        and "2012_000001.jpg" in line
    )
    (root / "ImageSets/Segmentation/train.txt").write_text("")
    assert "data sets are empty" in find_faults(name, "train").lines()[0]
