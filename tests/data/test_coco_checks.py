# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Faults in COCO's format: named with file and place, or accepted by Detectron2 as it is."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances

from dcn_plugin.data.checked_mapper import CheckedMapper
from dcn_plugin.data.coco_checks import (
    NO_IMAGE_LEFT,
    RLE_MASKS,
    AnnotationUse,
    check_annotations,
    decode_runs,
    read_coco,
    rle_fault,
)
from dcn_plugin.data.dataset_checks import find_faults
from dcn_plugin.data.faults import DataError, Faults
from dcn_plugin.evaluation import DetectionEvaluator
from tests.datasets import tiny_lvis, unregister
from tests.tiny_coco import write_json


def faults_of(content: Any, split: str = "train", **options: Any) -> Faults:
    faults = Faults()
    check_annotations(content, faults, AnnotationUse(split, **options))
    return faults


def test_a_good_file_has_no_faults(content: dict) -> None:
    for split in ("train", "test"):
        assert faults_of(content, split, required=("bbox", "segmentation")).lines() == []


NAN, INF = float("nan"), float("inf")
TEXT = b'{"images": [],\n "annotations": [{"id": 1, "bbox": [1, 2}]}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b" \n", "must be JSON, but is empty"),
        (b"not JSON", "must be JSON, got Expecting value in line 1, column 1"),
        (TEXT, "must be JSON, got .* in line 2, column 41"),
        (b'\xef\xbb\xbf{"images": []}', r"byte order mark \(BOM\) of UTF-8.*without BOM.*sed"),
        ('{"images": []}'.encode("utf-16"), r"byte order mark \(BOM\) of UTF-16.*iconv -f UTF-16"),
        (b'{"images":\n ["\xe4"]}', "must be UTF-8, got the byte 0xE4 in line 2, byte 4"),
        (b"[" * 100_000, "must be JSON that Python can read"),
        (b"[" + b"1" * 5000 + b"]", "must be "),
        (b"[]", "an object with lists of images, annotations and categories, got a list"),
        (b'{"images": {}}', "images must be a list, got {}"),
        (b'{"annotations": null}', "annotations must be a list, got None"),
        (b'{"categories": [3]}', "categories must be objects, got 3 at index 0"),
    ],
)
def test_text_that_is_not_coco_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))} .*{message}"):
        read_coco(str(path))


def test_the_command_removes_the_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "old.json").write_text('{"images": []}', encoding=encoding)
        with pytest.raises(DataError) as error:
            read_coco(str(tmp_path / "old.json"))
        command = str(error.value).partition("for example ")[2]
        subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
        assert read_coco(str(tmp_path / "new.json")) == {"images": []}


def setter(part: str, key: str, value: Any, index: int = 0) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        content[part][index][key] = value

    return change


def remover(part: str, key: str) -> Callable[[dict], None]:
    return lambda content: content[part][0].pop(key)


def all_annotations(**values: Any) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for item in content["annotations"]:
            item.update(values)

    return change


NUMBERS = "finite numbers between -1e30 and 1e30"
BOX = rf"bbox that is not 4 {NUMBERS} \(5 if rotated\)"
POLYGON = f"polygon that is not {NUMBERS}"
ERRORS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "NaN": (setter("annotations", "bbox", [NAN, 1, 2, 3]), BOX),
    "infinite": (setter("annotations", "bbox", [1, 1, INF, 3]), BOX),
    "cancelling": (setter("annotations", "bbox", [1e308, -1e308, 10, 10]), BOX),
    "beyond float32": (setter("annotations", "bbox", [1, 1, 1e39, 3]), BOX),
    "null": (setter("annotations", "bbox", [1, None, 2, 3]), BOX),
    "text": (setter("annotations", "bbox", ["1", 1, 2, 3]), BOX),
    "no list": (setter("annotations", "bbox", "1 1 2 3"), BOX),
    "three": (setter("annotations", "bbox", [1, 2, 3]), BOX),
    "booleans": (setter("annotations", "bbox", [True, False, True, True]), BOX),
    "huge": (setter("annotations", "bbox", [1, 2, 3, 10**400]), BOX),
    "negative": (setter("annotations", "bbox", [5, 5, -2, 3]), "negative width or height"),
    "all empty": (
        all_annotations(bbox=[5, 5, 0, 3]),
        r"no annotation has a bbox with width and height \(1\): the file",
    ),
    "no box": (
        remover("annotations", "bbox"),
        r"have no bbox \(1\): annotations\[0\]: id 1",
    ),
    "polygon": (setter("annotations", "segmentation", [[1, 1, NAN, 2, 3, 3]]), POLYGON),
    "huge polygon": (
        setter("annotations", "segmentation", [[1, 1, 9, 1, 9, 9], [1e39, 1, -1e39, 1, 5, 5]]),
        POLYGON,
    ),
    "RLE": (
        setter("annotations", "segmentation", {"size": [3, 3], "counts": [9]}),
        "RLE has another size",
    ),
    "RLE counts": (
        setter("annotations", "segmentation", {"size": [96, 96], "counts": [9]}),
        "do not add up",
    ),
    "category": (setter("annotations", "category_id", 9), "category_id that is not in categories"),
    "text category": (setter("annotations", "category_id", "1"), "category_id that is not a numb"),
    "text categories": (setter("categories", "id", "disc"), "categories have an id that is not a"),
    "same categories": (setter("categories", "id", 2), "categories have the id of another one"),
    "no categories": (
        lambda content: content.pop("categories"),
        "there are no categories, at least one",
    ),
    "crowd": (setter("annotations", "iscrowd", "0"), "iscrowd that is neither 0 nor 1"),
    "ignore": (setter("annotations", "ignore", 1), '"ignore", which Detectron2 does not support'),
    "same ids": (setter("annotations", "id", 2), "annotations have the id of another one"),
    "no id": (remover("annotations", "id"), "annotations have an id that is not a number"),
    "same images": (setter("images", "id", 2), "images have the id of another one"),
    "mixed ids": (
        setter("images", "id", "1"),
        r"images have ids of mixed types \(1\): the file: text like",
    ),
    "no image id": (remover("images", "id"), "images have an id that is neither"),
    "no size": (remover("images", "height"), "images have no height and width"),
    "null size": (setter("images", "width", None), "images have no height and width"),
    "name": (setter("images", "file_name", 5), "file_name that is not text"),
    "NUL": (setter("images", "file_name", "a\0"), "file_name that is not text, or has a NUL"),
    "category name": (setter("categories", "name", 5), "categories have a name that is not text"),
    "no name": (remover("images", "file_name"), "images have no file_name"),
    "no images": (lambda content: content.update(images=[]), "there are no images, at least one"),
    "no image": (remover("annotations", "image_id"), "image_id that is neither a number nor text"),
    "other images": (
        all_annotations(image_id=99),
        "no image left|: annotations are of other images only",
    ),
}


@pytest.mark.parametrize(
    "counts",
    ["~~~~~~~~~~zzz0000", "", "o" * 50, "o" * 50 + "1", "é0", "@", "PS9P", "`", "1\n", "00"],
)
def test_compressed_masks_that_pycocotools_must_not_read(counts: str, content: dict) -> None:
    content["annotations"][0]["segmentation"] = {"size": [96, 96], "counts": counts}
    (line,) = faults_of(content, "test").lines()
    assert line.startswith("error: annotations have a segmentation whose RLE has ")


@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 300), width=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_compressed_masks_are_decoded_as_by_pycocotools(seed: int, height: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    mask = cv2.resize(rng.random((3, 5)), (width, height)) + 0.2 * rng.random((height, width)) > 0.6
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    rle["counts"] = rle["counts"].decode()
    assert rle_fault(rle, (height, width)) is None
    flat, runs = mask.ravel(order="F"), decode_runs(rle["counts"])
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2 == 1, runs), flat)
    assert "do not add up" in rle_fault({**rle, "size": [height + 1, width]}, (height + 1, width))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("fault", ERRORS)
def test_faults_are_errors(fault: str, split: str, content: dict) -> None:
    change, message = ERRORS[fault]
    change(content)
    errors = [line for line in faults_of(content, split).lines() if line.startswith("error: ")]
    assert [line for line in errors if re.search(message, line)], errors
    assert all("\n" not in line and len(line) < 1000 for line in errors)


NO_POLYGONS = "segmentation that is not a list of lists"
LVIS_ERRORS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "NaN": (setter("annotations", "bbox", [NAN, 1, 2, 3]), BOX),
    "no box": (remover("annotations", "bbox"), "annotations have no bbox"),
    "category": (setter("annotations", "category_id", 9), "category_id that is not in categories"),
    "polygon": (setter("annotations", "segmentation", [[1, 1, NAN, 2, 3, 3]]), "polygon that is"),
    "line": (setter("annotations", "segmentation", [[1, 1, 2, 2]]), "is not 3 or more points"),
    "no polygon": (setter("annotations", "segmentation", []), "annotations have no segmentation"),
    "RLE": (setter("annotations", "segmentation", {"size": [9, 9], "counts": [81]}), NO_POLYGONS),
    "no address": (remover("images", "coco_url"), "images have no coco_url"),
    "address": (setter("images", "coco_url", "0.jpg"), "does not end in folder/file"),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("fault", LVIS_ERRORS)
def test_faults_of_lvis_are_errors(fault: str, split: str, tmp_path: Path) -> None:
    change, message = LVIS_ERRORS[fault]
    with tiny_lvis(tmp_path) as name:
        path = Path(MetadataCatalog.get(name).json_file)
        assert find_faults(name, split).lines() == []
        content = json.loads(path.read_text())
        change(content)
        write_json(path, content)
        (line,) = find_faults(name, split, read=()).lines()  # masks are read without MASK_ON too
        assert line.startswith("error: ") and re.search(message, line)


def test_categories_of_the_same_name_are_a_warning(content: dict) -> None:
    content["categories"][1]["name"] = content["categories"][0]["name"]
    (line,) = faults_of(content).lines()
    assert re.match(r"warning: categories have the name of another one.*\(1\): categ.*\[1\]", line)


def test_a_box_that_is_null_is_one_fault(content: dict) -> None:
    setter("annotations", "bbox", None)(content)
    assert len(faults_of(content).lines()) == 1


def test_faults_of_one_use_only(content: dict) -> None:
    setter("annotations", "area", NAN)(content)
    assert faults_of(content).lines() == []
    assert "area that is not a number" in faults_of(content, "test").lines()[0]
    del content["annotations"][0]["area"], content["annotations"][0]["iscrowd"]
    assert faults_of(content, "test").lines() == []
    all_annotations(iscrowd=1)(content)
    assert "no image left" in faults_of(content).lines()[0]
    assert faults_of(content, filter_empty=False).lines() == []
    content["annotations"] = []
    (line,) = faults_of(content, "test").lines()
    assert line.startswith("warning: there are no annotations")
    del content["annotations"]  # as COCO's test-dev
    assert faults_of(content, "test").lines() == []


def test_annotations_of_other_images_are_a_warning(content: dict) -> None:
    other = {"id": 1, "image_id": 99, "category_id": 7, "bbox": [NAN, 0, 1, 1]}
    content["annotations"].append(other)
    faults = faults_of(content)
    assert not faults.errors and [len(places) for places in faults.warnings.values()] == [1]
    # COCO's evaluation looks annotations up by their ids.
    assert "annotations have the id of another one" in faults_of(content, "test").errors
    other["id"] = 90
    assert faults_of(content, "test").lines() == faults_of(content).lines()


def test_evaluation_by_a_file_ignores_what_the_loader_rejects(content: dict) -> None:
    content["annotations"][0] |= {"ignore": 1, "category_id": 9}
    assert len(faults_of(content, "test").errors) == 2
    faults = faults_of(content, "test", loaded=False)
    assert not faults.errors and "category_id that is not in" in next(iter(faults.warnings))


def test_images_with_few_keypoints_need_not_be_complete(content: dict) -> None:
    options = {"required": ("bbox", "keypoints"), "min_keypoints": 1}
    assert NO_IMAGE_LEFT in faults_of(content, **options).errors
    first, second, *others = content["annotations"]
    first["keypoints"] = [5, 5, 2, 6, 6, 0]
    for item in [second, *others]:
        item["image_id"] = 2
    assert faults_of(content, **options).lines() == []
    second["keypoints"] = [5, 5, 0, 6, 6, 0]  # none is visible
    assert faults_of(content, **options).lines() == []
    second["keypoints"][2] = 1
    (line,) = faults_of(content, **options).lines()
    assert f"annotations have no keypoints ({len(others)}): annotations[2]" in line
    options["min_keypoints"] = 2
    assert NO_IMAGE_LEFT in faults_of(content, **options).errors


def test_masks_in_rle_need_the_format_bitmask(content: dict) -> None:
    mask = {"size": [96, 96], "counts": [96 * 96]}
    content["annotations"][0]["segmentation"] = mask
    masks = {"required": ("bbox", "segmentation")}
    kind = RLE_MASKS
    assert list(faults_of(content, **masks, mask_format="polygon").errors) == [kind]
    assert list(faults_of(content, **masks).warnings) == [kind]
    assert faults_of(content, **masks, mask_format="bitmask").lines() == []
    assert faults_of(content, mask_format="polygon").lines() == []
    assert faults_of(content, "test", **masks, mask_format="polygon").lines() == []
    content["annotations"][0]["iscrowd"] = 1
    assert faults_of(content, **masks, mask_format="polygon").lines() == []


def test_what_detectron2_takes_is_at_most_a_warning(content: dict) -> None:
    items = content["annotations"]
    items[0]["bbox"] = [5, 5, 0, 3]  # as two of COCO's train2017
    items[1]["segmentation"] = [[1, 1, 2, 2]]
    items.append({**items[2], "id": 90, "image_id": 99})  # as in COCO's valminusminival
    items.append({**items[2], "id": 91, "bbox": [200, 3, 5, 5]})
    content["images"].append(content["images"][0])
    faults = faults_of(content)
    assert not faults.errors and len(faults.warnings) == 5
    for kind in ("without width or height", "not 3 or more points", "outside the image"):
        assert [w for w, places in faults.warnings.items() if kind in w and len(places) == 1]
    items[2] |= {"iscrowd": 1, "segmentation": {"size": [96, 96], "counts": [96 * 96]}}
    items[0]["bbox"] = [5, 5, 3, 3, 30.0]  # rotated
    assert not faults_of(content).errors
    items.append(copy.copy(items[0]))
    assert faults_of(content).errors and not faults_of(content, unique_ids=False).errors


def test_counts_and_first_places(content: dict) -> None:
    all_annotations(bbox=[NAN, 0, 1, 1])(content)
    (line,) = faults_of(content).lines()
    count = len(content["annotations"])
    assert (
        count > 3 and line.startswith("error: annotations have a bbox") and f" ({count}): " in line
    )
    assert "annotations[0]: id 1, image_id 1" in line and line.count("annotations[") == 3


# Values that a broken tool may write.
VALUES = st.one_of(
    st.sampled_from([None, True, False, NAN, INF, -1, 0, 1, 3, 1e308, -0.5, 2**70, "", "1", "a\n"]),
    st.lists(st.sampled_from([0, 1, 7.5, -3, NAN, None, "x"]), max_size=6),
    st.just({}),
    st.just([[1, 1, 5, 1, 5, 5]]),
    st.just({"size": [96, 96], "counts": [1, 2]}),
)
KEYS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"),
}
CHANGES = st.lists(
    st.sampled_from([(part, key) for part, keys in KEYS.items() for key in keys]).flatmap(
        lambda at: st.tuples(st.just(at), st.integers(0, 2), st.one_of(st.just("remove"), VALUES))
    ),
    min_size=1,
    max_size=3,
)


@given(changes=CHANGES)
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_file_is_rejected_in_one_line_or_can_be_used(
    changes: list, folder: Path, tmp_path: Path
) -> None:
    content = json.loads((folder / "annotations.json").read_text())
    for (part, key), index, value in changes:
        item = content[part][min(index, len(content[part]) - 1)]
        if key == "bbox" and isinstance(value, list) and len(value) == 5:
            continue  # rotated boxes need a mapper of their own
        if value == "remove":
            item.pop(key, None)
        else:
            item[key] = value
    path = write_json(tmp_path / "data.json", content)
    unregister("mutated")
    register_coco_instances("mutated", {}, str(path), str(folder))
    try:
        for split in ("train", "test"):
            try:
                faults = find_faults("mutated", split)
                faults.raise_error("mutated")
                use(split, tmp_path)
            except DataError as error:
                line = str(error)
                assert "\n" not in line and ("mutated: " in line or ".png has 96 x 96" in line)
    finally:
        unregister("mutated")


def use(split: str, folder: Path) -> None:
    """Loads a data set as training and evaluation do."""
    records = get_detection_dataset_dicts(["mutated"], filter_empty=split == "train")
    stock = DatasetMapper(is_train=split == "train", augmentations=[], image_format="BGR")
    mapper = CheckedMapper(stock)
    for record in records:
        mapped = mapper(record)
        if split == "train":
            assert mapped["instances"].gt_boxes.tensor.isfinite().all()
    if split == "test":
        evaluator = DetectionEvaluator("mutated", output_dir=str(folder / "results"))
        evaluator.reset()
        for record in records:
            evaluator.process([record], [{"instances": mapped_ground_truth(record)}])
        results = evaluator.evaluate()
        assert all(not math.isinf(v) for v in results.get("bbox", {}).values())


def mapped_ground_truth(record: dict) -> Instances:
    """Returns the ground truth of a record as detections."""
    boxes = [
        BoxMode.convert(item["bbox"][:4], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
        for item in record["annotations"]
    ]
    return Instances(
        (96, 96),
        pred_boxes=Boxes(torch.tensor(boxes).float().reshape(-1, 4)),
        pred_classes=torch.tensor([i["category_id"] for i in record["annotations"]]).long(),
        scores=torch.full((len(boxes),), 0.5),
    )
