# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Times functions in turns, so that a change of the machine's speed affects all of them."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Function = Callable[[], object]

MIN_TURNS, MAX_TURNS = 3, 15
REPLAYS = 10  # of a graph in a row, to amortize the launch of the first
# The message of PyTorch's dispatch over dtypes, in every library that uses it.
UNSUPPORTED = re.compile(r"not implemented for '\w+'")


@dataclass(frozen=True)
class SelfTimed:
    """A function that runs in another process; it returns the milliseconds that it took there."""

    function: Callable[[], float]

    def __call__(self) -> float:
        """Runs once."""
        return self.function()


@dataclass
class Times:
    """Milliseconds of each call including synchronization, and of each replay of a CUDA graph."""

    wall: list[float] = field(default_factory=list)
    graph: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Returns the median of the calls."""
        return statistics.median(self.wall)

    @property
    def graph_median(self) -> float | None:
        """Returns the median of the replays, or None."""
        return statistics.median(self.graph) if self.graph else None

    @property
    def spread(self) -> float:
        """Returns the interquartile range in percent of the median."""
        low, _, high = statistics.quantiles(self.wall, n=4, method="inclusive")
        return 100 * (high - low) / self.median


def measure(
    functions: Mapping[Key, Function],
    device: str,
    seconds: float,
    least: int = MIN_TURNS,
    most: int = MAX_TURNS,
    graphs: bool = True,
) -> dict[Key, Times | None]:
    """Times functions in turns, after one warm-up turn.

    Args:
        functions: The functions to time.
        device: "cpu" or "cuda".
        seconds: No further turn starts after this time per function.
        least: Minimum number of turns, whatever the time.
        most: Maximum number of turns.
        graphs: Whether to time CUDA graphs too, on a GPU.

    Returns:
        The times; None for a function that does not support its dtype.
    """
    supported = {key: function for key, function in functions.items() if runs(function, device)}
    captured = {}
    if graphs and device == "cuda":
        captured = {key: capture(function) for key, function in supported.items()}
    times = {key: Times() for key in supported}
    end = time.perf_counter() + seconds * len(supported)
    for turn in range(most):
        if turn >= least and time.perf_counter() > end:
            break
        for key, function in supported.items():
            times[key].wall.append(call_ms(function, device))
            graph = captured.get(key)
            if graph is not None:
                times[key].graph.append(replay_ms(graph))
    return {key: times.get(key) for key in functions}


def runs(function: Function, device: str) -> bool:
    """Calls a function; returns whether it supports its dtype. Other errors are raised."""
    try:
        function()
    except RuntimeError as error:
        if UNSUPPORTED.search(str(error)):
            return False
        raise
    synchronize(device)
    return True


def synchronize(device: str) -> None:
    """Waits for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def call_ms(function: Function, device: str) -> float:
    """Times one call, without the release of its results.

    On a CPU it is the second of two, since caches hold what was timed before.
    """
    if isinstance(function, SelfTimed):
        return function()
    if device == "cpu":
        function()
    synchronize(device)
    start = time.perf_counter()
    results = function()
    synchronize(device)
    milliseconds = 1e3 * (time.perf_counter() - start)
    del results
    return milliseconds


def capture(function: Function) -> torch.cuda.CUDAGraph | None:
    """Captures a function as a CUDA graph; returns None if it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # PyTorch requires warm-up on a side stream
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        if "captur" not in str(error):
            raise
        return None
    return graph


def replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    """Times the replays of a graph with CUDA events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / REPLAYS
