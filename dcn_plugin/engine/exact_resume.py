# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Resumed training that gives bitwise the same weights as training without interruption.

Two parts, for any subclass of Detectron2's `DefaultTrainer`: return a `ResumableTrainLoader` from
`build_train_loader`, and add an `ExactResume` hook in `build_hooks`. A run must be resumed with the
same number of processes; the number of DataLoader workers may differ.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from detectron2 import data
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.serialize import PicklableWrapper

from dcn_plugin.compat import INNER_TRAINER, saves_inner_trainer
from dcn_plugin.data.workers import ignore_sigterm_of_others, sigterm_blocked

from .optimizer import check_state
from .restricted_pickle import restricted

Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]
DATA, STEP = 0, 1  # what a seed is for


class ResumableTrainLoader:
    """Detectron2's `build_detection_train_loader(cfg)`, which can start at any iteration.

    Data sets, samplers, aspect ratio grouping and workers are those of the config. The augmentation
    of an image follows from the seed and the image's position in the sampler's stream.

    Attributes:
        seed (int): SEED of the config, or a random one; checkpoints of `ExactResume` keep it.
        start_iter (int): iteration of the first batch, read when iteration begins.
    """

    def __init__(self, cfg: CfgNode, mapper: Mapper | None = None) -> None:
        """Loads the data set; no image is read before the first batch is requested.

        Args:
            cfg: the keys that `build_detection_train_loader` reads, and SEED.
            mapper: default: Detectron2's `DatasetMapper`. It must not change width and height of a
                dataset dict. If it returns None, the next image of the data set is used.
        """
        self.cfg = cfg
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.start_iter = 0
        settings = self._settings_from_config(mapper=mapper)
        self.mapper: Mapper = settings.pop("mapper")
        dataset = settings.pop("dataset")
        self.dataset = (
            DatasetFromList(dataset, copy=False) if isinstance(dataset, list) else dataset
        )
        self.samplers = {self.seed: settings.pop("sampler")}
        self.settings = settings

    def _settings_from_config(self, **arguments: Any) -> dict[str, Any]:
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.SEED = self.seed  # for Detectron2's main; samplers of 0.6 draw their seed from NumPy
        with temporary_seed(self.seed), restricted(data.build):  # proposals
            return build_detection_train_loader.from_config(cfg, **arguments)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        # A generator: Detectron2 0.6 calls iter() before it resumes.
        dataset, sampler, mapper = self.dataset, None, self.mapper
        if not isinstance(dataset, IterableDataset):
            if self.seed not in self.samplers:  # resumed
                settings = self._settings_from_config(dataset=dataset, mapper=mapper)
                self.samplers = {self.seed: settings["sampler"]}
            dataset, mapper = MappedStream(self, self.samplers[self.seed]), None
        elif self.start_iter > 0:
            logging.getLogger(__name__).warning("An IterableDataset cannot resume: it starts again")
        batches = iter(
            build_detection_train_loader(dataset, mapper=mapper, sampler=sampler, **self.settings)
        )
        # The first batch starts the workers. Those of a MappedStream handle the signal.
        ours = isinstance(dataset, MappedStream)
        with sigterm_blocked() if ours else nullcontext():
            first = list(islice(batches, 1))
        yield from first
        del first  # not kept for the whole run
        yield from batches


class MappedStream(IterableDataset[dict[str, Any]]):
    """Images in a sampler's order, from an iteration on."""

    def __init__(self, loader: ResumableTrainLoader, sampler: Sampler[int]) -> None:
        self.dataset: Dataset[dict[str, Any]] = loader.dataset
        self.mapper = PicklableWrapper(loader.mapper)
        self.sampler, self.seed, self.rank = sampler, loader.seed, comm.get_rank()
        self.grouped: bool = loader.settings["aspect_ratio_grouping"]
        self.batch_size = loader.settings["total_batch_size"] // comm.get_world_size()
        # (position, index) of images that the batches so far have left in buckets, and the
        # position from which on the sampler's stream has not been read.
        self.pending: list[tuple[int, int]] = []
        self.next_position = loader.start_iter * self.batch_size
        if self.grouped:
            self._replay_grouping(loader.start_iter)

    def _replay_grouping(self, batches: int) -> None:
        """Finds what `AspectRatioGroupedDataset` would have left in its buckets."""

        @cache
        def is_wide(index: int) -> bool:
            record = self.dataset[index]
            return _is_wide(record if "width" in record else self.mapper(record))

        stream = enumerate(self.sampler)
        buckets: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
        self.next_position = 0
        while batches > 0:
            position, index = next(stream)
            self.next_position = position + 1
            bucket = buckets[is_wide(index)]
            bucket.append((position, index))
            if len(bucket) == self.batch_size:
                bucket.clear()
                batches -= 1
        self.pending = sorted(buckets[False] + buckets[True])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stream = chain(self.pending, islice(enumerate(self.sampler), self.next_position, None))
        worker = get_worker_info()
        if worker is not None:
            ignore_sigterm_of_others()
        # The DataLoader takes batches from its workers in turn, or images if it groups them.
        chunk = 1 if self.grouped else self.batch_size
        for number, (position, index) in enumerate(stream):
            if worker is None or number // chunk % worker.num_workers == worker.id:
                with temporary_seed(derive_seed(self.seed, DATA, position, self.rank)):
                    mapped = self._map(index)
                yield mapped

    def _map(self, index: int) -> dict[str, Any]:
        # Not Detectron2's MapDataset, whose choice after None depends on earlier ones.
        for other in chain(range(index, len(self.dataset)), range(index)):
            mapped = self.mapper(self.dataset[other])
            fits = other == index or not self.grouped or mapped is None
            if mapped is not None and (fits or _is_wide(mapped) == _is_wide(self.dataset[index])):
                return mapped
        raise RuntimeError("the mapper returned None for every image of the data set")


class ExactResume(HookBase):
    """Lets a trainer with a `ResumableTrainLoader` resume exactly.

    It starts the loader at the trainer's first iteration, and seeds all random number generators
    before each forward pass in training, so that what the model samples follows from the seed, the
    iteration and the rank. Its checkpoint state has the seed, and with Detectron2 0.6, whose
    `DefaultTrainer` does not save it, the optimizer's state.
    """

    _handle: torch.utils.hooks.RemovableHandle | None = None

    @property
    def loader(self) -> ResumableTrainLoader:
        """The trainer's loader."""
        loader = self.trainer.data_loader
        if not isinstance(loader, ResumableTrainLoader):
            raise TypeError(
                "ExactResume: build_train_loader must return a ResumableTrainLoader, got a "
                f"{type(loader).__name__}"
            )
        return loader

    def before_train(self) -> None:
        self.loader.start_iter = self.trainer.start_iter
        self._handle = self.trainer.model.register_forward_pre_hook(self._seed_step)

    def after_train(self) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _seed_step(self, model: nn.Module, inputs: Any) -> None:
        # Here rather than in before_step: reading data draws random numbers in between.
        if model.training:
            seed_all_rng(derive_seed(self.loader.seed, STEP, self.trainer.iter, comm.get_rank()))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"seed": self.loader.seed}
        if not saves_inner_trainer(self.trainer):
            state[INNER_TRAINER] = self.trainer._trainer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.seed = state["seed"]
        if INNER_TRAINER in state:
            inner = state[INNER_TRAINER]
            check_state(self.trainer.optimizer, inner["optimizer"], self.trainer.model)
            self.trainer._trainer.load_state_dict(inner)


def _is_wide(record: dict[str, Any]) -> bool:
    return record["width"] > record["height"]


def derive_seed(*numbers: int) -> int:
    """Returns a seed below 2**32 that follows from some non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Seeds Python, NumPy and PyTorch's CPU generator, and restores their states at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
