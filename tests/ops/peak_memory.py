# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Measures the workspace of a call, in a subprocess.

`python -m tests.ops.peak_memory DEVICE` prints one JSON object per line. With
MALLOC_MMAP_THRESHOLD_=65536 in the environment, glibc returns freed memory to the system.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from pathlib import Path

import torch

from dcn_plugin.ops import deform_conv2d
from tests.devices import EMULATOR
from tests.ops.conv_cases import ConvCase

MIB = 1 << 20
SQUARE = {
    "kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1),
    "groups": 1, "offset_groups": 1, "bias": False,
}  # fmt: skip
# The columns of all positions, in float32, have 7 MiB in the first case, 80 to 420 MiB in the
# others.
CASES = {
    "small": ConvCase(batch=1, in_channels=128, out_channels=64, size=(40, 40), **SQUARE),
    "many-images": ConvCase(batch=60, in_channels=128, out_channels=64, size=(40, 40), **SQUARE),
    "large-map": ConvCase(batch=1, in_channels=128, out_channels=64, size=(280, 275), **SQUARE),
    "larger-map": ConvCase(batch=1, in_channels=4, out_channels=8, size=(800, 760), **SQUARE),
}


def resident() -> int:
    """Returns the resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """Peak memory beyond that at construction, in bytes.

    Tensors are counted on a GPU and in the emulator. On the CPU a thread polls every millisecond:
    the peak that the kernel records cannot be reset everywhere, and PyTorch's allocator does not
    count allocations of C++.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if EMULATOR:
            self.before = EMULATOR.reset_peak()
        elif device == "cpu":
            self.before = self.highest = resident()
            self.done = threading.Event()
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        else:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def _watch(self) -> None:
        while not self.done.wait(0.001):
            self.highest = max(self.highest, resident())

    def bytes(self) -> int:
        if EMULATOR:
            return EMULATOR.peak() - self.before
        if self.device == "cpu":
            self.done.set()
            self.thread.join()
            return max(self.highest, resident()) - self.before
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before


def drawn(name: str, device: str, dtype: torch.dtype, layout: torch.memory_format) -> dict:
    """Returns random arguments, drawn in `dtype`: float64 is slow."""
    case = CASES[name]
    planes = case.offset_groups * case.taps

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=dtype, device=device)

    input = rand(case.batch, case.in_channels, *case.size).contiguous(memory_format=layout)
    tensors = {
        "input": input,
        "offset": rand(case.batch, 2 * planes, *case.out_size),
        "weight": rand(case.out_channels, case.in_channels, *case.kernel),
        "mask": rand(case.batch, planes, *case.out_size),
    }
    return {k: v.requires_grad_() for k, v in tensors.items()}


def measure(name: str, device: str, dtype: torch.dtype, layout: torch.memory_format) -> dict:
    """Returns the workspace of forward and backward and the size of all columns, in MiB."""
    call = drawn(name, device, dtype, layout)
    leaves = list(call.values())
    peak = Peak(device)
    output = deform_conv2d(**call, **CASES[name].geometry)
    forward = peak.bytes() - output.nbytes
    grad_output = torch.randn_like(output)
    peak = Peak(device)
    gradients = torch.autograd.grad(output, leaves, grad_output)
    backward = peak.bytes() - sum(g.nbytes for g in gradients)
    columns = call["input"].nbytes * CASES[name].taps
    sizes = {"forward": forward, "backward": backward, "columns": columns}
    return {"name": name, "dtype": str(dtype), **{k: round(v / MIB, 1) for k, v in sizes.items()}}


def main(device: str) -> None:
    torch.set_num_threads(2)
    if EMULATOR:  # what is allocated does not depend on what is computed
        EMULATOR.run_few_warps(1)
    # Warm-up: loads the GEMM library.
    measure("small", device, torch.float32, torch.contiguous_format)
    for name in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.contiguous_format, torch.channels_last):
                print(json.dumps({"layout": str(layout), **measure(name, device, dtype, layout)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
