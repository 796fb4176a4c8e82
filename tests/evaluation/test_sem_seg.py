# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Mean IoU at the size of the image, and at that of the network, beside a slow count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2", reason="the evaluator is Detectron2's")

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog

from dcn_plugin import add_dcn_config
from dcn_plugin.engine import Trainer
from dcn_plugin.evaluation import NetworkSizeSemSegEvaluator, build_evaluator
from tests.datasets import data_sets_in
from tests.tiny_voc import write_tiny_cityscapes

NAME = "cityscapes_fine_sem_seg_train"
CLASSES = 19


@pytest.fixture(autouse=True)
def root(tmp_path: Path) -> Iterator[Path]:
    """Generated Cityscapes in the catalogue."""
    write_tiny_cityscapes(tmp_path)
    with data_sets_in(str(tmp_path)):
        yield tmp_path


def config(at_network_size: bool) -> CfgNode:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.TEST.SEM_SEG_AT_NETWORK_SIZE = at_network_size
    cfg.INPUT.MIN_SIZE_TEST = 40
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def slow_iou(predicted: list[np.ndarray], truth: list[np.ndarray]) -> float:
    """Returns the mean IoU in percent over the classes that are shown or predicted."""
    found = []
    for label in range(CLASSES):
        both = either = shown = 0
        for ours, theirs in zip(predicted, truth, strict=True):
            valid = theirs != 255
            both += int(((ours == label) & (theirs == label) & valid).sum())
            either += int((((ours == label) | (theirs == label)) & valid).sum())
            shown += int((theirs == label).sum())
        if either:
            found.append(both / either if shown else 0.0)
    return 100 * float(np.mean(found))


@pytest.mark.parametrize("at_network_size", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_slow_count(at_network_size: bool, seed: int, tmp_path: Path) -> None:
    cfg = config(at_network_size)
    evaluator = build_evaluator(cfg, NAME, str(tmp_path / "found"))
    assert isinstance(evaluator, NetworkSizeSemSegEvaluator) == at_network_size
    evaluator.reset()
    rng = np.random.default_rng(seed)
    predicted, truth = [], []
    for (item,) in Trainer.build_test_loader(cfg, NAME):
        size = item["height"], item["width"]
        assert size == ((40, 40) if at_network_size else (96, 96))
        record = next(r for r in DatasetCatalog.get(NAME) if r["file_name"] == item["file_name"])
        with Image.open(record["sem_seg_file_name"]) as labels:
            truth.append(np.asarray(labels.resize(size[::-1], Image.Resampling.NEAREST)))
        ours = np.where(rng.random(size) < 0.7, truth[-1], rng.integers(0, CLASSES, size))
        ours[ours == 255] = 4
        predicted.append(ours)
        scores = torch.nn.functional.one_hot(torch.from_numpy(ours).long(), CLASSES)
        evaluator.process([item], [{"sem_seg": scores.permute(2, 0, 1).float()}])
    found = evaluator.evaluate()["sem_seg"]
    assert found["mIoU"] == pytest.approx(slow_iou(predicted, truth))
    assert 0 < found["mIoU"] < 100
