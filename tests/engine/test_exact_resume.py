# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The loader starts at any iteration, and the hook seeds training steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

import detectron2.data.build
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MapDataset
from detectron2.data.build import build_batch_data_loader
from detectron2.data.catalog import MetadataCatalog

from dcn_plugin.engine import ExactResume, ResumableTrainLoader

SAMPLERS = ["TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"]
if hasattr(detectron2.data.build, "_build_weighted_sampler"):  # Detectron2's main
    SAMPLERS.append("WeightedTrainingSampler")
WIDE = (1, 1, 0, 1, 0, 0, 1, 1, 1)  # aspect ratios of the images


@pytest.fixture
def name() -> Iterator[str]:
    """Registers nine dataset dicts, some wide and some high, with a frequent and a rare class."""
    records = [
        {
            "image_id": number,
            "width": 40 + 20 * wide,
            "height": 50,
            "annotations": [{"category_id": int(number == 0), "bbox": [0, 0, 9, 9]}],
        }
        for number, wide in enumerate(WIDE)
    ]
    DatasetCatalog.register("nine_images", lambda: records)
    yield "nine_images"
    DatasetCatalog.remove("nine_images")
    MetadataCatalog.remove("nine_images")


def config(name: str, **keys: object) -> CfgNode:
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (name,)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 3, 5
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.9, 0.7
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(name, 1.5)]  # of WeightedTrainingSampler
    for key, value in keys.items():
        setattr(cfg.DATALOADER, key, value)
    return cfg


def augment(record: dict[str, Any]) -> dict[str, Any]:
    """Draws from every generator that an augmentation may use."""
    return {**record, "drawn": (random.random(), float(np.random.rand()), float(torch.rand(1)))}


def batches(loader: Any, count: int, start: int = 0, seed: int | None = None) -> list[list[dict]]:
    loader.start_iter = start
    loader.seed = loader.seed if seed is None else seed
    return list(islice(loader, count))


def ids(batches: list[list[dict]]) -> list[list[int]]:
    return [[image["image_id"] for image in batch] for batch in batches]


@pytest.mark.parametrize("grouping", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_resumes_the_stock_order_with_the_same_augmentation(
    sampler: str, grouping: bool, name: str
) -> None:
    keys = {"SAMPLER_TRAIN": sampler, "ASPECT_RATIO_GROUPING": grouping}
    loader = ResumableTrainLoader(config(name, **keys), augment)
    whole = batches(loader, 12)
    stock = build_batch_data_loader(
        MapDataset(loader.dataset, lambda record: record),
        loader.samplers[5],
        3,
        aspect_ratio_grouping=grouping,
    )
    assert ids(whole) == ids(list(islice(stock, 12)))
    assert len({image["drawn"] for batch in whole for image in batch}) == 36
    for start in range(1, 9):
        resumed = ResumableTrainLoader(config(name, **keys), augment)
        torch.rand(3), np.random.rand(4), random.random()  # whatever else was drawn
        assert batches(resumed, 12 - start, start) == whole[start:]


@pytest.mark.parametrize("grouping", [False, True])
def test_workers_do_not_change_batches(grouping: bool, name: str) -> None:
    keys = {"ASPECT_RATIO_GROUPING": grouping}
    expected = batches(ResumableTrainLoader(config(name, **keys), augment), 9)
    for start in (0, 3):
        loader = ResumableTrainLoader(config(name, **keys, NUM_WORKERS=2), augment)
        assert batches(loader, 9 - start, start) == expected[start:]


def test_the_seed_of_a_checkpoint_replaces_that_of_the_config(name: str) -> None:
    expected = batches(ResumableTrainLoader(config(name), augment), 4)
    cfg = config(name)
    cfg.SEED = -1
    loader = ResumableTrainLoader(cfg, augment)
    assert batches(loader, 4) != expected
    assert batches(loader, 4, seed=5) == expected


def test_random_states_of_the_process_are_restored(name: str) -> None:
    def draw() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    loader = ResumableTrainLoader(config(name, NUM_WORKERS=0), augment)
    dataset = iter(loader)
    next(dataset)  # creating a DataLoader's iterator draws a number
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    next(dataset)
    assert draw() == expected


def test_no_image_is_read_before_the_first_batch(name: str) -> None:
    read = []

    def mapper(record: dict) -> dict:
        read.append(record["image_id"])
        return record

    iterator = iter(ResumableTrainLoader(config(name, ASPECT_RATIO_GROUPING=False), mapper))
    assert not read
    next(iterator)
    assert len(read) == 3


@pytest.mark.parametrize("grouping", [False, True])
def test_images_that_the_mapper_drops_are_replaced(grouping: bool, name: str) -> None:
    def mapper(record: dict) -> dict | None:
        return augment(record) if record["image_id"] not in (2, 3) else None

    cfg = config(name, ASPECT_RATIO_GROUPING=grouping)
    whole = batches(ResumableTrainLoader(cfg, mapper), 12)
    assert {i for batch in ids(whole) for i in batch} == {0, 1, 4, 5, 6, 7, 8}
    assert batches(ResumableTrainLoader(cfg, mapper), 7, 5) == whole[5:]
    with pytest.raises(RuntimeError, match="returned None for every image"):
        next(iter(ResumableTrainLoader(cfg, lambda record: None)))


def test_an_iterable_dataset_starts_again_with_a_warning(name: str, caplog) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict]:
            yield from ({"image_id": i} for i in range(6))

    loader = ResumableTrainLoader(config(name, ASPECT_RATIO_GROUPING=False))
    loader.dataset, loader.mapper = Stream(), augment  # as Detectron2's main returns it
    assert ids(batches(loader, 2, start=1)) == [[0, 1, 2], [3, 4, 5]]
    assert "An IterableDataset cannot resume" in caplog.text


def draw_in_training(loader: ResumableTrainLoader, start: int, steps: int) -> list[float]:
    """Returns numbers that a model draws in training."""
    drawn: list[float] = []

    class Model(nn.Module):
        def forward(self, batch: list[dict]) -> None:
            numbers = float(torch.rand(1)), float(np.random.rand()), random.random()
            drawn.append(numbers)

    model, hook = Model(), ExactResume()
    trainer = hook.trainer = SimpleNamespace(model=model, data_loader=loader, start_iter=start)
    trainer.state_dict = None
    hook.before_train()
    for trainer.iter, batch in enumerate(islice(loader, steps), start):
        model(batch)
        torch.rand(trainer.iter + start)  # other hooks
    hook.after_train()
    assert not model._forward_pre_hooks
    return drawn


def test_the_hook_seeds_steps_and_starts_the_loader(name: str) -> None:
    whole = draw_in_training(ResumableTrainLoader(config(name), augment), 0, 5)
    assert len(set(whole)) == 5
    loader = ResumableTrainLoader(config(name), augment)
    assert draw_in_training(loader, 2, 3) == whole[2:]
    assert loader.start_iter == 2


def test_the_hook_needs_its_loader() -> None:
    hook = ExactResume()
    hook.trainer = SimpleNamespace(data_loader=[], start_iter=0)
    with pytest.raises(TypeError, match="must return a ResumableTrainLoader, got a list"):
        hook.before_train()
    hook.after_train()
