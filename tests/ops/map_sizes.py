# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Runs one layer on maps of many sizes, in a subprocess, and measures what stays in memory.

`python -m tests.ops.map_sizes SIZES DTYPE` prints a JSON object, in MiB. oneDNN compiles a kernel
for each combination of sizes and strides of a GEMM, and keeps it.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import torch

from dcn_plugin.ops import deform_conv2d
from tests.ops.conv_cases import ConvCase, gradients
from tests.ops.peak_memory import MIB, SQUARE, resident

# Its im2col tiles have up to 512 positions, the most of all layers.
LAYER = {"batch": 1, "in_channels": 16, "out_channels": 16, **SQUARE}
LARGEST = 40  # rows and columns of a map


def compiled() -> int:
    """Returns the size of all executable memory that no file backs, in bytes."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, _, _, inode, *_ = line.split()
        if "x" in permissions and inode == "0":
            begin, end = (int(address, 16) for address in addresses.split("-"))
            total += end - begin
    return total


def run(size: tuple[int, int], dtype: torch.dtype, layout: torch.memory_format) -> None:
    case = ConvCase(size=size, **LAYER)
    call = case.draw("cpu", dtype)
    call["input"] = call["input"].contiguous(memory_format=layout)
    grad_output = torch.ones(1, case.out_channels, *case.out_size, dtype=dtype)
    gradients(deform_conv2d, call, grad_output.contiguous(memory_format=layout))


def main(sizes: str, dtype: str) -> None:
    torch.set_num_threads(1)  # each thread has its own kernels
    layouts = (torch.contiguous_format, torch.channels_last)
    for layout in layouts:  # loads the GEMM library
        run((LARGEST, LARGEST), getattr(torch, dtype), layout)
    before = resident(), compiled()
    rng = random.Random(0)
    for i in range(int(sizes)):
        size = rng.randint(1, LARGEST), rng.randint(1, LARGEST)
        run(size, getattr(torch, dtype), layouts[i % 2])
    grown = resident() - before[0], compiled() - before[1]
    print(json.dumps({"resident": grown[0] / MIB, "compiled": grown[1] / MIB}))


if __name__ == "__main__":
    main(*sys.argv[1:])
