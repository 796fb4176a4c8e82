# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Loading that restarts, processes and workers do not change."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="the loader reads Detectron2's data sets")

from detectron2.config import CfgNode, get_cfg

from dcn_plugin import add_dcn_config
from dcn_plugin.data import TrainLoader, build_train_loader
from dcn_plugin.data.loader import what_is_learnt


def config(name: str, **loader: object) -> CfgNode:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.DATASETS.TRAIN = (name,)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.INPUT.MIN_SIZE_TRAIN = (64, 80, 96)
    cfg.INPUT.CROP.ENABLED = True
    cfg.SEED = 5
    cfg.DATALOADER.NUM_WORKERS = 0
    for key, value in loader.items():
        setattr(cfg.DATALOADER, key, value)
    return cfg


def batches(loader: TrainLoader, count: int) -> list[list[dict]]:
    return list(islice(loader, count))


def assert_same(found: list[list[dict]], expected: list[list[dict]]) -> None:
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        for image, twin in zip(batch, other, strict=True):
            assert image["image_id"] == twin["image_id"]
            assert torch.equal(image["image"], twin["image"])


def test_workers_change_nothing(tiny_coco) -> None:
    expected = batches(build_train_loader(config(tiny_coco)), 6)
    assert_same(batches(build_train_loader(config(tiny_coco, NUM_WORKERS=2)), 6), expected)


def test_what_is_not_learnt_is_not_carried_along(tiny_coco) -> None:
    cfg = config(tiny_coco)
    record = {"file_name": "a.jpg", "sem_seg_file_name": "a.png"}
    record["annotations"] = [{"bbox": [0, 0, 1, 1], "segmentation": [[0, 0, 1, 0, 1, 1]]}]

    cfg.MODEL.META_ARCHITECTURE = "RFCN"
    assert what_is_learnt(record, cfg) == {
        "file_name": "a.jpg",
        "annotations": [{"bbox": [0, 0, 1, 1]}],
    }
    cfg.MODEL.META_ARCHITECTURE = "DeepLab"
    assert what_is_learnt(record, cfg) == {"file_name": "a.jpg", "sem_seg_file_name": "a.png"}
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_ON = "PanopticFPN", True
    assert what_is_learnt(record, cfg) == record
    assert "segmentation" in record["annotations"][0]  # the data set's own stays whole


def test_a_restart_changes_nothing(tiny_coco) -> None:
    expected = batches(build_train_loader(config(tiny_coco)), 7)
    loader = build_train_loader(config(tiny_coco))
    torch.rand(3), np.random.rand(4), random.random()  # whatever else was drawn
    loader.start = 4
    assert_same(batches(loader, 3), expected[4:])


def test_every_epoch_augments_anew_and_every_seed_another_way(tiny_coco) -> None:
    first = batches(build_train_loader(config(tiny_coco)), 8)
    by_image: dict[int, list] = {}
    for batch in first:
        for image in batch:
            by_image.setdefault(image["image_id"], []).append(image["image"])
    assert all(len({image.shape for image in seen}) > 1 for seen in by_image.values())
    loader = build_train_loader(config(tiny_coco))
    loader.seed = 6
    other = batches(loader, 8)
    ids = [[image["image_id"] for batch in some for image in batch] for some in (first, other)]
    assert ids[0] != ids[1]


def test_random_numbers_of_the_program_are_left_alone(tiny_coco) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    iterator = iter(build_train_loader(config(tiny_coco)))
    next(iterator)
    assert draw() == expected


def test_nothing_is_read_before_the_first_batch(tiny_coco) -> None:
    read = []

    def mapper(record: dict) -> dict:
        read.append(record["image_id"])
        return record

    iterator = iter(build_train_loader(config(tiny_coco), mapper))
    assert not read
    next(iterator)
    assert len(read) == 2


@pytest.mark.parametrize("sampler", ["RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"])
def test_detectron2s_other_samplers(sampler: str, tiny_coco) -> None:
    cfg = config(tiny_coco, SAMPLER_TRAIN=sampler, REPEAT_THRESHOLD=0.9, RANDOM_SUBSET_RATIO=0.5)
    loader = build_train_loader(cfg)
    found = batches(loader, 6)
    loader.start = 3
    assert_same(batches(loader, 3), found[3:])
    seen = {image["image_id"] for batch in found for image in batch}
    assert len(seen) == (2 if sampler == "RandomSubsetTrainingSampler" else 4)


def test_an_unknown_sampler_is_named(tiny_coco) -> None:
    with pytest.raises(ValueError, match=r"SAMPLER_TRAIN must be .* got 'Nothing'"):
        build_train_loader(config(tiny_coco, SAMPLER_TRAIN="Nothing"))


def test_an_image_that_the_mapper_refuses_is_replaced(tiny_coco) -> None:
    def mapper(record: dict) -> dict | None:
        return record if record["image_id"] != 2 else None

    found = batches(build_train_loader(config(tiny_coco), mapper), 8)
    assert {image["image_id"] for batch in found for image in batch} == {1, 3, 4}
    with pytest.raises(RuntimeError, match="refused all of its images"):
        next(iter(build_train_loader(config(tiny_coco), lambda record: None)))
