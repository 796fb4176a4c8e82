# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Which images every iteration learns from."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("detectron2", reason="the streams are Detectron2's samplers")

from detectron2.data.samplers import TrainingSampler

from dcn_plugin.data import TrainingBatches

sizes = st.integers(1, 30)
seeds = st.integers(0, 99)


def take(count: int, size: int, seed: int, *, groups: bool = False, **how: int) -> list[list[int]]:
    """Returns the images of the first batches; every third image is of another group."""
    of_image = [int(index % 3 == 0) for index in range(size)] if groups else None
    batches = TrainingBatches(TrainingSampler(size, seed=seed), groups=of_image, **how)
    found = list(islice(batches, count))
    start = how.get("start", 0)
    assert [{iteration for iteration, _ in batch} for batch in found] == [
        {iteration} for iteration in range(start, start + count)
    ]
    return [[index for _, index in batch] for batch in found]


@given(sizes, seeds, st.sampled_from([1, 2, 3, 6]), st.booleans())
def test_processes_share_the_batches_of_one(
    size: int, seed: int, processes: int, groups: bool
) -> None:
    whole = take(5, size, seed, batch_size=6, groups=groups)
    shares = [
        take(5, size, seed, batch_size=6, rank=rank, processes=processes, groups=groups)
        for rank in range(processes)
    ]
    for number, batch in enumerate(whole):
        assert [index for share in shares for index in share[number]] == batch


@given(sizes, seeds, st.integers(0, 40), st.booleans())
def test_a_restart_goes_on_where_it_was(size: int, seed: int, start: int, groups: bool) -> None:
    whole = take(start + 3, size, seed, batch_size=4, groups=groups)
    assert take(3, size, seed, batch_size=4, start=start, groups=groups) == whole[start:]


@given(sizes, seeds)
def test_without_groups_every_image_comes_once_in_an_epoch(size: int, seed: int) -> None:
    found = [index for batch in take(2 * size, size, seed, batch_size=1) for index in batch]
    assert sorted(found[:size]) == sorted(found[size:]) == list(range(size))
    assert found == list(islice(TrainingSampler(size, seed=seed), 2 * size))


@given(st.integers(3, 30), seeds)
def test_a_batch_is_of_one_group_and_no_image_is_lost(size: int, seed: int) -> None:
    found = take(3 * size, size, seed, batch_size=3, groups=True)
    assert all(len({index % 3 == 0 for index in batch}) == 1 for batch in found)
    counts = [sum(batch.count(index) for batch in found) for index in range(size)]
    # Nine epochs are drawn, but for what waits: at most two of each group.
    assert sum(counts) == 9 * size and max(counts) - min(counts) <= 3


@pytest.mark.parametrize(("batch_size", "processes"), [(0, 1), (5, 2), (1, 2)])
def test_a_batch_must_be_shared_evenly(batch_size: int, processes: int) -> None:
    message = f"positive multiple of the {processes} processes, got {batch_size}"
    with pytest.raises(ValueError, match=message):
        TrainingBatches(TrainingSampler(9, seed=0), batch_size, processes=processes)
