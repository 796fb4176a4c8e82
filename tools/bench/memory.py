# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Measures what a call takes at its peak beyond inputs, outputs and gradients: its workspace.

On a GPU PyTorch's allocator knows it. On the CPU it does not see what C++ allocates, so the kernel
is asked for the most that the process had in memory. That runs in a process of its own, in which
glibc gives back at once what is freed; where the times are taken this would cost time.
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
    """Gives a function that measures in another process, which lives as long as the context."""
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
    """Returns MiB, or None where the kernel does not tell."""
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
    """Lets the kernel's record of the peak begin anew; tells whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status(field: str) -> int:
    """Returns a size of this process in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{STATUS} has no line {field}")
    return int(found[1]) * 1024


def cuda_workspace(call: Call, direction: str) -> float:
    """Returns MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call.run(direction)
    torch.cuda.synchronize()
    return workspace(torch.cuda.max_memory_allocated() - before, results)


def workspace(peak: int, results: tuple[Tensor, ...]) -> float:
    """Takes the results off a peak; the rest may come out below zero by the size of pages."""
    return max(0, peak - sum(result.nbytes for result in results)) / MIB
