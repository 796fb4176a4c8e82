# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Workspace budget, memory kept for map sizes, and tensors of more than 2**31 elements."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcn_plugin.ops import deform_conv2d
from tests.devices import kernels_of

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
# On the CPU: 24 MiB of copies in the forward pass, 56 MiB of buffers in the backward pass, and a
# few MiB of columns and taps for each of two threads.
BUDGET_MIB = {"cpu": {"forward": 40, "backward": 64}, "cuda": {"forward": 256, "backward": 256}}


def test_workspace_is_bounded_for_any_batch_and_map_size(device):
    if device == "cpu" and not Path("/proc/self/statm").exists():
        pytest.skip("measuring the memory of a process requires /proc")
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.peak_memory", device],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    measured = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(measured) == 16
    for row in measured:
        for direction, budget in BUDGET_MIB[kernels_of(device)].items():
            assert row[direction] < budget, row
    # The measurement works, and the columns of a whole map would exceed the budget.
    assert max(row["forward"] for row in measured) > 1
    assert max(row["columns"] for row in measured) > max(BUDGET_MIB[kernels_of(device)].values())


def grown_over_map_sizes(sizes, dtype):
    if not Path("/proc/self/maps").exists():
        pytest.skip("measuring the memory of a process requires /proc")
    # AddressSanitizer (make sanitize) keeps freed memory, by default 256 MiB of it.
    sanitizer = os.environ.get("ASAN_OPTIONS", "") + ":quarantine_size_mb=1"
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.map_sizes", str(sizes), dtype],
        cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "ASAN_OPTIONS": sanitizer},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])  # those of oneDNN's GEMM
def test_few_gemm_kernels_for_any_map_sizes(dtype):
    """OneDNN maps 256 KiB of executable memory for each combination of sizes and strides."""
    # Positions of a map have 64 padded sizes, and are the M dimension of one GEMM and the K
    # dimension of another, which overwrites or adds; the tiles of the forward pass have 12 sizes.
    kernels = 3 * 64 + 2 * 12
    assert grown_over_map_sizes(200, dtype)["compiled"] <= kernels / 4


def test_map_sizes_keep_no_memory():
    assert grown_over_map_sizes(2000, "float32")["resident"] < 15


def free_memory(device):
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    free = int(found[1]) * 1024
    group = Path("/sys/fs/cgroup")  # a container may have less memory than the machine
    try:
        used = int((group / "memory.current").read_text())
        return min(free, int((group / "memory.max").read_text()) - used)
    except (OSError, ValueError):
        return free


def need_memory(device, gib):
    free = free_memory(device) / GIB
    if free < gib:
        pytest.skip(f"requires {gib} GiB of memory, {free:.0f} GiB are free")


LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape, layout",
    [
        ((1, 1, 46400, 46400), "nchw"),
        # also at the start of the last image or channel
        ((24, 1, 9700, 9700), "nchw"),
        ((1, 24, 9700, 9700), "nchw"),
        ((1, 24, 9700, 9700), "nhwc"),
    ],
    ids=str,
)
def test_input_of_more_than_2_31_elements(shape, layout, device):
    need_memory(device, 19)
    batch, channels, height, width = shape
    if layout == "nhwc":
        input = torch.zeros(batch, height, width, channels, device=device).permute(0, 3, 1, 2)
    else:
        input = torch.zeros(shape, device=device)
    assert input.numel() > 2**31
    # The very last tap reads the last four pixels, at their centre.
    input[-1, -1, -2:, -2:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    stride = (height // 4, width // 4)
    out = [(size - 1) // s + 1 for size, s in zip(shape[2:], stride, strict=True)]
    offset = torch.zeros(batch, 2, *out, device=device)
    last = [size - 1.5 - (o - 1) * s for size, o, s in zip(shape[2:], out, stride, strict=True)]
    offset[-1, :, -1, -1] = torch.tensor(last)
    weight = torch.full((1, channels, 1, 1), 8.0, device=device)
    leaves = [t.requires_grad_() for t in (input, offset, weight)]
    output = deform_conv2d(*leaves, stride=stride)
    assert output[-1, 0, -1, -1].item() == 2.5 * 8
    assert output.count_nonzero().item() == 1
    grad_output = torch.zeros_like(output)
    grad_output[-1, 0, -1, -1] = 1
    of_input, of_offset, of_weight = torch.autograd.grad(output, leaves, grad_output)
    assert of_input[-1, -1, -2:, -2:].eq(2).all()
    assert of_input.count_nonzero().item() == 4 * channels
    assert of_offset[-1, :, -1, -1].tolist() == [16, 8]
    assert of_weight[0, -1].item() == 2.5


@pytest.mark.slow
def test_output_of_more_than_2_31_elements(device):
    need_memory(device, 6)
    # Much more padding than input. The offset, expanded from one element, shifts the four pixels
    # of the input to the last four positions.
    padding = 23171
    input = torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=device).half()[None, None]
    side = 2 + 2 * padding
    shift = torch.tensor(-float(padding), device=device)
    offset = shift.expand(1, 2, side, side)
    weight = torch.full((1, 1, 1, 1), 8.0, dtype=torch.float16, device=device)
    output = deform_conv2d(input, offset, weight, padding=padding)
    assert output.numel() > 2**31
    assert output[0, 0, -2:, -2:].tolist() == [[8, 16], [24, 32]]
    assert output[0, 0, :, :-2].count_nonzero().item() == 0
    assert output[0, 0, :-2].count_nonzero().item() == 0
