# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Images to learn from, which a restart, other processes or workers do not change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, DatasetMapper, get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm

from .batches import IndexStream, TrainingBatches
from .check import learns_boxes, learns_pixels
from .seeds import image_seed, seeded

Record = dict[str, Any]


class SeededImages(Dataset[Record]):
    """Images as a mapper makes them, with random numbers of their iteration."""

    def __init__(
        self, records: Sequence[Record], mapper: Callable[[Record], Record | None], seed: int
    ) -> None:
        """Keeps what it needs.

        Args:
            records: of the images, in Detectron2's format.
            mapper: turns a record into what a network takes; None: to be left out.
            seed: of the training.
        """
        self.records = records
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self.records)

    def __getitem__(self, item: tuple[int, int]) -> Record:
        """Returns the image of (iteration, index), or the next that the mapper accepts."""
        iteration, index = item
        for following in range(len(self)):
            record = self.records[(index + following) % len(self)]
            with seeded(image_seed(self.seed, iteration, record)):
                mapped = self.mapper(record)
            if mapped is not None:
                return mapped
        raise RuntimeError("the mapper of the data set refused all of its images")


class TrainLoader:
    """Batches of images, from any iteration on."""

    def __init__(
        self,
        records: Sequence[Record],
        mapper: Callable[[Record], Record | None],
        make_batches: Callable[[int, int], TrainingBatches],
        *,
        seed: int,
        workers: int,
    ) -> None:
        """Keeps what it needs; nothing is read yet.

        Args:
            records: of the images, in Detectron2's format.
            mapper: turns a record into what a network takes.
            make_batches: of a seed, from an iteration on.
            seed: of the training.
            workers: processes that read images.
        """
        self.records = records
        self.mapper = mapper
        self.make_batches = make_batches
        self.seed = seed
        self.workers = workers
        self.start = 0

    def __iter__(self) -> Iterator[list[Record]]:
        """Yields batches from iteration `start` on, and reads nothing before."""
        yield from DataLoader(
            SeededImages(self.records, self.mapper, self.seed),
            batch_sampler=self.make_batches(self.seed, self.start),
            num_workers=self.workers,
            collate_fn=trivial_batch_collator,
            generator=torch.Generator(),  # else it draws a number of the program's
        )


def build_train_loader(
    cfg: CfgNode, mapper: Callable[[Record], Record | None] | None = None
) -> TrainLoader:
    """Builds Detectron2's loader for training in a way that can be resumed.

    Args:
        cfg: with the keys that Detectron2's `build_detection_train_loader` reads, and SEED, below 0
            for any.
        mapper: None: Detectron2's.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    groups = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = [int(record["width"] > record["height"]) for record in records]
    make_stream = stream_maker(cfg, records)
    if mapper is None:
        records = [what_is_learnt(record, cfg) for record in records]

    def make_batches(seed: int, start: int) -> TrainingBatches:
        return TrainingBatches(
            make_stream(seed=seed),
            cfg.SOLVER.IMS_PER_BATCH,
            rank=comm.get_rank(),
            processes=comm.get_world_size(),
            groups=groups,
            start=start,
        )

    return TrainLoader(
        DatasetFromList(records, copy=False),  # in one buffer, which workers share
        mapper or DatasetMapper(cfg, True),
        make_batches,
        seed=cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed(),
        workers=cfg.DATALOADER.NUM_WORKERS,
    )


def what_is_learnt(record: Record, cfg: CfgNode) -> Record:
    """Returns a record without what Detectron2's mapper would copy or read for nothing.

    Args:
        record: of an image.
        cfg: of the network.
    """
    kept = dict(record)
    architecture = cfg.MODEL.META_ARCHITECTURE
    if learns_pixels(architecture):
        kept.pop("annotations", None)
    elif learns_boxes(architecture):
        kept.pop("sem_seg_file_name", None)
    if not cfg.MODEL.MASK_ON and "annotations" in kept:
        kept["annotations"] = [
            {key: value for key, value in item.items() if key != "segmentation"}
            for item in kept["annotations"]
        ]
    return kept


def stream_maker(cfg: CfgNode, records: Sequence[Record]) -> Callable[..., IndexStream]:
    """Returns what makes the sampler that DATALOADER.SAMPLER_TRAIN names, of a `seed`.

    Args:
        cfg: of the training.
        records: of all images.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        return partial(TrainingSampler, len(records))
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD
        )
        return partial(RepeatFactorTrainingSampler, factors)
    if name == "RandomSubsetTrainingSampler":
        subset = partial(
            RandomSubsetTrainingSampler, len(records), cfg.DATALOADER.RANDOM_SUBSET_RATIO
        )
        return lambda seed: subset(seed_shuffle=seed, seed_subset=seed)
    raise ValueError(
        "DATALOADER.SAMPLER_TRAIN must be TrainingSampler, RepeatFactorTrainingSampler or "
        f"RandomSubsetTrainingSampler, got {name!r}"
    )
