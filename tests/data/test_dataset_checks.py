# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Faults of registered data sets: of their files, and of the records that loaders return."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from dcn_plugin.data.dataset_checks import check_records, find_faults
from dcn_plugin.data.faults import Faults
from tests.datasets import tiny_lvis, tiny_panoptic, unregister
from tests.tiny_coco import write_json

NAN, INF = float("nan"), float("inf")


class TestFiles:
    """Images of a file in COCO's format."""

    @pytest.fixture
    def name(self, folder: Path, tmp_path: Path):
        self.path, self.images = tmp_path / "data.json", folder
        register_coco_instances("checked", {}, str(self.path), str(folder))
        yield "checked"
        unregister("checked")

    def errors(self, content: dict, **options: Any) -> str:
        write_json(self.path, content)
        return "\n".join(find_faults("checked", "train", **options).lines())

    def test_absent_images_are_counted(self, name: str, content: dict) -> None:
        assert self.errors(content) == ""
        content["images"][1]["file_name"] = "sub/none.png"
        assert f"regular files (1): '{self.images}/sub/none.png'" in self.errors(content)

    @pytest.mark.parametrize("outside", ["../data/000.png", "sub/../../data.png", "/etc/hostname"])
    def test_files_outside_the_folder(self, name: str, outside: str, content: dict) -> None:
        content["images"][0]["file_name"] = outside
        text = self.errors(content)
        if outside == "../data/000.png":  # ends in the folder after all
            assert text == ""
            return
        assert "files are outside the folder of the data set" in text
        assert "ALLOW_FILES_OUTSIDE" in text and str(self.images) in text
        assert "files are outside" not in self.errors(content, outside=True)

    def test_links_may_lead_out(self, name: str, content: dict, tmp_path: Path) -> None:
        target = tmp_path / "elsewhere.png"
        target.write_bytes((self.images / "000.png").read_bytes())
        (self.images / "link.png").symlink_to(target)
        content["images"][0]["file_name"] = "link.png"
        assert self.errors(content) == ""

    @pytest.mark.parametrize(
        "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("none.png", path)]
    )
    def test_what_is_no_regular_file_is_an_error(
        self, make: Callable, name: str, content: dict, tmp_path: Path
    ) -> None:
        path = tmp_path / "special.png"
        make(path)
        content["images"][0]["file_name"] = str(path)
        text = self.errors(content, outside=True)
        assert f"files do not exist, or are not regular files (1): '{path}'" in text

    def test_relative_and_absolute_paths_are_the_same(
        self, name: str, content: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(self.images.parent)
        MetadataCatalog.get(name).__dict__["image_root"] = self.images.name
        content["images"][0]["file_name"] = str(self.images / "000.png")
        assert self.errors(content) == ""
        content["images"][0]["file_name"] = "../other/000.png"
        assert "files are outside" in self.errors(content)
        MetadataCatalog.get(name).__dict__["image_root"] = "."
        assert "files are outside" in self.errors(content)

    def test_paths_may_be_path_objects(self, name: str, content: dict) -> None:
        unregister(name)
        register_coco_instances(name, {}, self.path, self.images)
        assert self.errors(content) == "" and len(DatasetCatalog.get(name)) == 3
        content["images"][0]["file_name"] = "none.png"
        assert "files do not exist" in self.errors(content)


def test_images_of_lvis_are_looked_for(tmp_path: Path) -> None:
    with tiny_lvis(tmp_path) as name:
        image = sorted((tmp_path / "train2017").glob("*.png"))[1]
        image.unlink()
        (line,) = find_faults(name, "train").lines()
        assert f"or are not regular files (1): '{image}'" in line


@pytest.mark.parametrize("split", ["train", "test"])
def test_panoptic_data_sets_need_all_label_maps(split: str, tmp_path: Path) -> None:
    with tiny_panoptic(tmp_path) as name:
        path = tmp_path / "sem_seg/001.png"
        assert find_faults(name, split, labels=(2, 255)).lines() == []
        Image.new("L", Image.open(path).size, 60).save(path)
        (line,) = find_faults(name, split, labels=(2, 255)).lines()
        assert f"label maps cannot be used, of 4 that were read (1): {path} must have" in line
        path.unlink()
        (line,) = find_faults(name, split).lines()
        assert f"or are not regular files (1): '{path}'" in line


class Numbered(Dataset):
    """Records that cannot be read."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        raise AssertionError("a check must not read files")


class Endless(IterableDataset):
    """Records without end."""

    def __iter__(self) -> Iterator[dict]:
        while True:
            yield {"file_name": "none.png"}


@pytest.mark.parametrize("kind", [Numbered, Endless])
def test_torch_data_sets_are_not_read(kind: type) -> None:
    DatasetCatalog.register("torch_data", kind)
    try:
        assert find_faults("torch_data", "train").lines() == [
            f"warning: data sets that are not a list of records are not checked (1): "
            f"{kind.__name__}"
        ]
    finally:
        unregister("torch_data")


@pytest.mark.parametrize("box", [[1, 1, NAN, 5], [1e308, -1e308, 1, 1], None, "text", [[1, 2]]])
def test_boxes_of_records_are_finite(box: Any) -> None:
    records = [{"annotations": [{"bbox": box}, {"bbox": [1, 1, 2.5, 2]}, {}], "image_id": 7}]
    records[0]["annotations"].append({"bbox": np.float32([1, 2, 3, 4])})
    faults = Faults()
    check_records(records, faults, {})
    (line,) = faults.lines()
    assert "bbox that is not finite numbers (1): image 7" in line


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bbox": [NAN, 1, 2, 3]}, "a bbox that is not finite numbers"),
        ({"category_id": 2}, "a category_id that is not an integer from 0 to 1"),
        ({"category_id": -1}, "a category_id that is not"),
        ({"category_id": "disc"}, "a category_id that is not"),
        ({"segmentation": [[1, 1, 5, 1, 5, INF]]}, "a polygon that is not finite numbers"),
        ({"keypoints": [1, NAN, 2]}, "keypoints that are not finite numbers"),
    ],
)
def test_faults_of_records_are_errors(values: dict, message: str) -> None:
    item = {"bbox": [1, 1, 5, 5], "category_id": np.int64(1), "segmentation": [[1, 1, 5, 1, 5, 5]]}
    metadata = {"thing_classes": ["disc", "square"]}
    for changed, count in ((item, 0), ({**item, **values}, 1)):
        faults = Faults()
        check_records([{"image_id": 7, "annotations": [changed]}], faults, metadata)
        assert len(faults.errors) == count
    assert re.match(f"error: annotations have {message}.* image 7: categ", faults.lines()[0])


def test_values_of_records_that_are_not_read_are_ignored() -> None:
    item = {"bbox": [1, 1, 5, 5], "segmentation": [[NAN] * 6], "category_id": 9, "iscrowd": 1}
    faults = Faults()
    check_records([{"annotations": [item]}], faults, {"thing_classes": ["disc"]}, read=())
    assert not faults.errors


def test_files_need_not_be_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    copy_of = tmp_path / "labels.png"
    copy_of.touch()
    records = [{"sem_seg_file_name": str(copy_of)}]
    other = tmp_path / "other"
    other.mkdir()
    for folder, count in (("s3://bucket/labels", 0), (str(other), 1), ("/no/folder", 0)):
        faults = Faults()
        check_records(records, faults, {"gt_dir": folder})
        assert len(faults.errors) == count
