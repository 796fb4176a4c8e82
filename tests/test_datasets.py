# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The generated data sets are what Detectron2's loaders and mapper expect."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import create_keypoint_hflip_indices

from tests.datasets import tiny_coco, tiny_keypoints, tiny_lvis, tiny_panoptic
from tests.tiny_coco import KEYPOINTS

Registered = Callable[[Path, int], AbstractContextManager[str]]


def mapper(**settings: object) -> DatasetMapper:
    return DatasetMapper(
        is_train=True,
        augmentations=[],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format="bitmask",
        **settings,
    )


@pytest.mark.parametrize(
    ("registered", "evaluator_type", "classes"),
    [
        (tiny_coco, "coco", 2),
        (tiny_keypoints, "coco", 1),
        (tiny_lvis, "lvis", 1203),
        (tiny_panoptic, "coco_panoptic_seg", 2),
    ],
)
def test_boxes_and_masks_agree(
    registered: Registered, evaluator_type: str, classes: int, tmp_path: Path
) -> None:
    with registered(tmp_path / "data", 3) as name:
        records = DatasetCatalog.get(name)
        metadata = MetadataCatalog.get(name)
        assert metadata.evaluator_type == evaluator_type
        assert len(metadata.thing_classes) == classes and len(records) == 3
        for record in records:
            mapped = mapper()(record)
            assert mapped["image"].shape == (3, 96, 96)
            instances = mapped["instances"]
            assert len(instances) == len(record["annotations"]) > 0
            boxes = instances.gt_masks.get_bounding_boxes().tensor
            assert (boxes - instances.gt_boxes.tensor).abs().max() <= 1
    assert name not in DatasetCatalog.list() and name not in MetadataCatalog.list()


def test_keypoints_lie_in_their_boxes(tmp_path: Path) -> None:
    with tiny_keypoints(tmp_path / "data") as name:
        flip = create_keypoint_hflip_indices([name])
        assert sorted(flip) == list(range(KEYPOINTS))
        for record in DatasetCatalog.get(name):
            mapped = mapper(use_keypoint=True, keypoint_hflip_indices=flip)(record)
            instances = mapped["instances"]
            keypoints = instances.gt_keypoints.tensor
            assert keypoints.shape == (len(instances), KEYPOINTS, 3)
            assert (keypoints[..., 2] > 0).sum(dim=1).tolist() == [KEYPOINTS - 1] * len(instances)
            for points, box in zip(keypoints, instances.gt_boxes.tensor, strict=True):
                x, y, visible = points[points[:, 2] > 0].T
                assert (x >= box[0]).all() and (x <= box[2]).all() and len(visible.unique()) == 2
                assert (y >= box[1]).all() and (y <= box[3]).all()


def test_panoptic_ground_truth_agrees(tmp_path: Path) -> None:
    """The pixels of stuff and things in sem_seg, in the panoptic image, and in segments_info."""
    with tiny_panoptic(tmp_path / "data") as name:
        metadata = MetadataCatalog.get(name)
        annotations = json.loads(Path(metadata.panoptic_json).read_text())["annotations"]
        for record, annotation in zip(DatasetCatalog.get(name), annotations, strict=True):
            labels = mapper()(record)["sem_seg"]
            assert set(labels.unique().tolist()) == {0, 1}
            with Image.open(Path(metadata.panoptic_root, annotation["file_name"])) as image:
                ids = torch.from_numpy(np.array(image)[..., 0].astype(int))
            for info in annotation["segments_info"]:
                segment = ids == info["id"]
                assert segment.sum() == info["area"] > 0
                stuff = metadata.stuff_dataset_id_to_contiguous_id.get(info["category_id"], 0)
                assert (labels[segment] == stuff).all()
            assert sum(info["area"] for info in annotation["segments_info"]) == ids.numel()
        semantic = DatasetCatalog.get("tiny_panoptic_stuffonly")
        assert len(semantic) == 4 and "annotations" not in semantic[0]
