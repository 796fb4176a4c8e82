# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""tools/check_dataset.py: faults of annotations and of every file, and the exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import check_dataset
import numpy as np
import pytest
from PIL import Image

from detectron2.data import DatasetCatalog

from tests.datasets import data_sets_in, tiny_keypoints, tiny_lvis, tiny_panoptic, unregister
from tests.tiny_coco import write_json, write_tiny_coco
from tests.tiny_voc import write_tiny_cityscapes, write_tiny_voc

CITYSCAPES = "cityscapes_fine_sem_seg_train"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Registers generated VOC and Cityscapes."""
    write_tiny_voc(tmp_path)
    write_tiny_cityscapes(tmp_path)
    with data_sets_in(str(tmp_path)):
        yield tmp_path


def check(capsys: pytest.CaptureFixture[str], *words: object, code: int) -> list[str]:
    with pytest.raises(SystemExit) as exit_:
        check_dataset.main([str(word) for word in words])
    out = capsys.readouterr().out
    assert exit_.value.code == code, (exit_.value.code, out)
    return out.splitlines()


def copy_labels(voc: Path) -> None:
    """Copies labels as tools/prepare_sbd.py does: without VOC's palette."""
    (voc / "SegmentationClassAug").mkdir()
    for path in (voc / "SegmentationClass").iterdir():
        labels = Image.fromarray(np.asarray(Image.open(path)))
        labels.save(voc / "SegmentationClassAug" / path.name)


def test_palettes_are_for_evaluation_only(root: Path, capsys) -> None:
    shutil.copytree(root / "VOC2012/SegmentationClass", root / "VOC2012/SegmentationClassAug")
    name = "voc_2012_sem_seg_val"
    assert check(capsys, name, "--split", "test", code=0) == [f"{name}: no faults"]
    (line,) = check(capsys, name, code=1)
    assert "is a palette image, whose indices Detectron2's mapper does not read" in line


def test_what_is_an_error_for_one_use_is_printed_once(root: Path, capsys) -> None:
    path = next((root / "VOC2007/Annotations").glob("*.xml"))
    text = path.read_text().replace("<difficult>0", "<difficult>Unspecified", 1)
    path.write_text(text)
    (line,) = check(capsys, "voc_2007_trainval", code=1)
    assert line.startswith("voc_2007_trainval: error: objects have a difficult that is")


def test_a_missing_list_is_named_in_words(root: Path, capsys) -> None:
    path = root / "VOC2007/ImageSets/Main/trainval.txt"
    path.unlink()
    (line,) = check(capsys, "voc_2007_trainval", code=1)
    assert line.startswith(f"voc_2007_trainval: error: missing {path}. Detectron2 looks for data")


def test_good_data_sets_have_no_faults(root: Path, tiny_coco, capsys) -> None:
    copy_labels(root / "VOC2012")
    names = [tiny_coco, "voc_2007_trainval", "voc_2007_trainval_no_difficult", CITYSCAPES]
    names.append("voc_2012_sem_seg_val")
    for more in ((), ("--annotations-only",)):
        lines = check(capsys, *names, *more, code=0)
        assert lines == [f"{name}: no faults" for name in names]


@pytest.mark.parametrize("registered", [tiny_keypoints, tiny_lvis, tiny_panoptic])
def test_other_formats_have_no_faults(registered, tmp_path: Path, capsys) -> None:
    with registered(tmp_path / "data", 3) as name:
        assert check(capsys, name, "--masks", code=0)[-1] == f"{name}: no faults"


def test_custom_data(tmp_path: Path, capsys) -> None:
    path = write_tiny_coco(tmp_path / "data", images=3)
    paths = path, path.parent
    try:
        lines = check(capsys, "--train-data", *paths, "--test-data", *paths, code=0)
        assert lines == ["custom_train: no faults", "custom_test: no faults"]
        content = json.loads(path.read_text())
        content["annotations"][0]["bbox"][0] = float("nan")
        content["annotations"][1]["area"] = None
        write_json(path, content)
        (line,) = check(capsys, "--train-data", *paths, code=1)
        assert line.startswith(
            f"custom_train: error: {path}: annotations have a bbox that is not 4"
        )
        assert len(check(capsys, "--test-data", *paths, code=1)) == 2
    finally:
        unregister("custom_")


def test_every_image_is_read(tmp_path: Path, tiny_coco, capsys) -> None:
    images = sorted((tmp_path / "tiny_coco").glob("*.png"))
    images[0].write_bytes(images[0].read_bytes()[:200])
    Image.new("RGB", (96, 50)).save(images[1])
    assert check(capsys, tiny_coco, "--annotations-only", code=0) == [f"{tiny_coco}: no faults"]
    (line,) = check(capsys, tiny_coco, code=1)
    assert line.startswith(f"{tiny_coco}: error: images cannot be used (2): {images[0]} ")
    assert f"{images[1]} has 96 x 50 pixels" in line
    Image.fromarray(np.full((96, 96), 4000, np.uint16)).save(images[0])
    assert "reads 255 for 4000" in check(capsys, tiny_coco, code=1)[0]


def test_every_label_map_is_read(root: Path, capsys) -> None:
    maps = sorted((root / "cityscapes/gtFine/train/ulm").glob("*_labelTrainIds.png"))
    labels = np.asarray(Image.open(maps[0])).copy()
    labels[:2] = 40
    Image.fromarray(labels).save(maps[0])
    Image.fromarray(np.full_like(labels, 255)).save(maps[1])
    Image.fromarray(labels[:50] % 19).save(maps[2])
    error, warning = check(capsys, CITYSCAPES, code=1)
    assert f"error: label maps cannot be used (2): {maps[0]} must have labels" in error
    assert "got 40 (192 pixels)" in error and f"{maps[2]} has 96 x 50 pixels" in error
    assert warning == f"{CITYSCAPES}: warning: label maps have ignored pixels only (1): " + (
        str(maps[1])
    )
    for path in maps:
        Image.fromarray(np.full_like(labels, 255)).save(path)
    line = f"data sets have label maps of ignored pixels only (1): all {len(maps)} that were read"
    assert check(capsys, CITYSCAPES, code=1)[0] == f"{CITYSCAPES}: error: {line}"
    lines = check(capsys, CITYSCAPES, "--split", "test", code=0)
    assert f"{CITYSCAPES}: warning: {line}" in lines
    maps[0].unlink()
    (line,) = check(capsys, CITYSCAPES, code=1)
    assert "error: " in line and maps[0].name in line


def test_absent_files_of_cityscapes_are_one_line(root: Path, capsys) -> None:
    for path in (root / "cityscapes/gtFine/train").rglob("*_labelTrainIds.png"):
        path.unlink()
    (line,) = check(capsys, CITYSCAPES, code=1)
    assert "Detectron2 needs them: Please generate labelTrainIds.png with" in line
    shutil.rmtree(root / "cityscapes/gtFine/train/ulm")
    (line,) = check(capsys, CITYSCAPES, code=1)
    assert f"Detectron2 needs them: {root}/cityscapes/gtFine/train/ulm/" in line


def test_a_torch_data_set_is_not_checked(capsys) -> None:
    DatasetCatalog.register("torch_data", lambda: range(3))  # as good as any other sequence
    try:
        (line,) = check(capsys, "torch_data", code=0)
        assert line.endswith("not a list of records are not checked (1): range")
    finally:
        unregister("torch_data")


def test_wrong_names(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match=r"check_dataset: .* got 'coco_2017_tarin'; the nearest: "):
        check_dataset.main(["coco_2017_tarin"])
    with pytest.raises(SystemExit, match=r"got '~'; DatasetCatalog.list\(\) has all$"):
        check_dataset.main(["~"])
    with pytest.raises(SystemExit, match="2"):
        check_dataset.main([])
    with pytest.raises(SystemExit, match="--train-data must be a JSON file and a folder"):
        check_dataset.main(["--train-data", "none.json", "none"])
    path = write_json(tmp_path / "data.json", {"categories": [{"id": 1, "name": 5}]})
    with pytest.raises(SystemExit, match=r"categories have a name that is not text .* 'name': 5}$"):
        check_dataset.main(["--train-data", str(path), str(tmp_path)])
    (line,) = check(capsys, "coco_2017_val", code=1)
    assert line.startswith("coco_2017_val: error: ") and "instances_val2017.json" in line
