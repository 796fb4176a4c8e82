# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Which images every iteration learns from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Protocol

from torch.utils.data import Sampler


class IndexStream(Protocol):
    """Any of Detectron2's samplers for training."""

    def _infinite_indices(self) -> Iterator[int]:
        """Yields the indices for all processes together."""


def share_of_batch(batch_size: int, processes: int) -> int:
    """Returns how many images of a batch each process has.

    Args:
        batch_size: of all processes together.
        processes: which share a batch.

    Raises:
        ValueError: if it cannot be shared evenly.
    """
    if batch_size < 1 or batch_size % processes:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a positive multiple of the {processes} processes, "
            f"got {batch_size}"
        )
    return batch_size // processes


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """Cuts an endless stream of images into batches, and a batch into the processes' shares.

    The batches are the same for any number of processes, and from any iteration on. With groups,
    all images of a batch are of one group: it waits until it is full, as in Detectron2.
    """

    def __init__(
        self,
        stream: IndexStream,
        batch_size: int,
        *,
        rank: int = 0,
        processes: int = 1,
        groups: Sequence[int] | None = None,
        start: int = 0,
    ) -> None:
        """Divides.

        Args:
            stream: of the indices of images.
            batch_size: of all processes together.
            rank: of this process.
            processes: which share a batch.
            groups: of each image; None: they are not kept apart.
            start: iteration to begin at.
        """
        share = share_of_batch(batch_size, processes)
        self.stream = stream
        self.batch_size = batch_size
        self.groups = groups
        self.share = slice(rank * share, (rank + 1) * share)
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Yields (iteration, index) of every image of this process, from `start` on."""
        batches = islice(self._batches(self.stream._infinite_indices()), self.start, None)
        for iteration, batch in enumerate(batches, self.start):
            yield [(iteration, index) for index in batch[self.share]]

    def _batches(self, indices: Iterable[int]) -> Iterator[list[int]]:
        waiting: dict[int, list[int]] = {}
        for index in indices:
            batch = waiting.setdefault(0 if self.groups is None else self.groups[index], [])
            batch.append(index)
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()
