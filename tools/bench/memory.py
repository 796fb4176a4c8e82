# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Measures the workspace of a call: its peak memory beyond inputs, outputs and gradients.

On a GPU PyTorch's allocator reports it. On the CPU PyTorch does not see allocations of C++ code, so
the peak resident memory is read from the kernel. This is done in a separate process, in which glibc
returns freed memory at once, since that setting would slow down the timed calls.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .cases import Call, ConvCase, Rival, RoiCase, Setting

MIB = 1 << 20
STATUS = Path("/proc/self/status")

Ask = Callable[[ConvCase | RoiCase, Setting, Rival, str], float | None]


@contextmanager
def cpu_process() -> Iterator[Ask]:
    """Yields a function that measures in another process, which ends with the context."""
    name = "MALLOC_MMAP_THRESHOLD_"
    before = os.environ.get(name)
    context = multiprocessing.get_context("spawn")  # a fork would inherit OpenMP's threads
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        os.environ[name] = "65536"  # glibc reads it when a process starts
        try:
            pool.submit(os.getpid).result()
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before
        yield lambda *what: pool.submit(cpu_workspace, *what).result()


def cpu_workspace(
    case: ConvCase | RoiCase, setting: Setting, rival: Rival, direction: str
) -> float | None:
    """Returns MiB, or None if the kernel does not report the peak."""
    setting.apply()
    # Loads the libraries and starts the threads.
    case.small().rivals(setting)[rival].run(direction)
    call = case.rivals(setting)[rival]
    if not reset_peak():
        return None
    before = status("VmRSS")
    results = call.run(direction)
    return workspace(status("VmHWM") - before, results)


def reset_peak() -> bool:
    """Resets the kernel's record of the peak; returns whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status(field: str) -> int:
    """Reads a size in bytes from /proc/self/status."""
    match = re.search(rf"^{field}:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{STATUS} has no line {field}")
    return int(match[1]) * 1024


def cuda_workspace(call: Call, direction: str) -> float:
    """Returns MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call.run(direction)
    torch.cuda.synchronize()
    return workspace(torch.cuda.max_memory_allocated() - before, results)


def workspace(peak: int, results: tuple[Tensor, ...]) -> float:
    """Subtracts the results from a peak; rounding to pages may make the rest negative."""
    return max(0, peak - sum(result.nbytes for result in results)) / MIB
