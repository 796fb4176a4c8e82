# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deliberate faults in a copy of the CUDA sources, which the emulator must report.

`python -m tests.cuda_emulator.faults copy` writes the copy for the Makefile's build `faults`, in
which each fault is off until it is selected. `... run` prints what the emulator reports for each,
as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dcn_plugin.ops import deform_conv2d, roi_pool
from tests.cuda_emulator.library import ROOT, Emulator
from tests.deterministic import deterministic_algorithms

OUT = ROOT / "build" / "cuda_emulator" / "faults"


def convolve(input: Tensor | None = None, *, size: int = 7) -> None:
    """Runs both passes of a convolution with 8 channels, two threads per tap."""
    if input is None:
        input = torch.randn(2, 8, size, size)
    input = input.contiguous(memory_format=torch.channels_last) if input.is_contiguous() else input
    leaves = [input, torch.randn(len(input), 18, *input.shape[2:]), torch.randn(4, 8, 3, 3)]
    output = deform_conv2d(*(leaf.requires_grad_() for leaf in leaves), padding=1)
    torch.autograd.grad(output.sum(), leaves)


def convolve_misaligned() -> None:
    """Runs a convolution whose input starts at an address that 16 does not divide."""
    storage = torch.randn(1 + 2 * 7 * 7 * 8)
    convolve(storage[1:].view(2, 7, 7, 8).permute(0, 3, 1, 2))


def convolve_far() -> None:
    """Runs a convolution whose input has rows that begin behind 2**31 elements."""
    convolve(far_input())


def far_input(dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns (2, 8, 5, 6) channels-last, with gaps: rows are more than 2**29 elements apart.

    The emulator does not use memory for what is not accessed.
    """
    strides = (5 * (2**29 + 8), 1, 2**29 + 8, 8)
    shape = (2, 8, 5, 6)
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert elements > 2**31
    input = torch.empty(elements, dtype=dtype).as_strided(shape, strides)
    return input.copy_(torch.randn(shape))


def pool() -> None:
    """Runs both passes of RoI pooling."""
    input = torch.randn(2, 8, 9, 9, requires_grad=True)
    boxes = torch.tensor([[0, 1, 1, 7, 7], [1, 0, 2, 8, 5]] * 4, dtype=torch.float32)
    roi_pool(input, boxes, 3).sum().backward()


def convolve_deterministic() -> None:
    with deterministic_algorithms():
        convolve()


@dataclass(frozen=True)
class Fault:
    """A replacement of code by a condition on `FAULT`, and what it must be reported as."""

    file: str
    code: str
    faulty: str
    report: str
    call: Callable[[], None] = convolve


IM2COL = "cuda/conv/deform_im2col.cu"
FAULTS = {
    # Just one: the accesses of later taps may land in another tensor.
    "a tap too many in the grid-stride loop": Fault(
        IM2COL,
        "if (index >= num_taps) {",
        "if (index >= num_taps + FAULT) {",
        "access out of bounds",
    ),
    "write one element too far": Fault(
        "cuda/conv/col2im_deterministic.cu",
        "params.keys[4 * index + k] =",
        "params.keys[4 * index + k + FAULT] =",
        "access out of bounds",
        convolve_deterministic,
    ),
    "index in 32 bits": Fault(
        "ops/feature_map_view.h",
        "return data + y * row_stride",
        "return data + (FAULT ? int(unsigned(y) * unsigned(row_stride)) : y * row_stride)",
        "access out of bounds",
        convolve_far,
    ),
    "columns freed before they are used": Fault(
        "cuda/conv/deform_conv2d_backward.cu",
        "tile.columns = columns.data_ptr<S>();\n    if (deterministic_",
        "tile.columns = (FAULT ? columns.clone() : columns).template data_ptr<S>();\n"
        "    if (deterministic_",
        "access out of bounds",
    ),
    "alignment not checked": Fault(
        "cuda/conv/tap_threads.cuh",
        "is_aligned(tile.map, tile.map_stride, size) &&",
        "(FAULT || is_aligned(tile.map, tile.map_stride, size)) &&",
        "misaligned access",
        convolve_misaligned,
    ),
    "gradient not set to zero": Fault(
        "cuda/conv/deform_conv2d_backward.cu",
        "gradients_.input.zero_();",
        "if (!FAULT) gradients_.input.zero_();",
        "read of uninitialised memory",
    ),
    "a key not written": Fault(
        "cuda/conv/col2im_deterministic.cu",
        "for (int k = 0; k < 4; ++k) {\n      const bool has_weight",
        "for (int k = FAULT ? 1 : 0; k < 4; ++k) {\n      const bool has_weight",
        "read of uninitialised memory",
        convolve_deterministic,
    ),
    "all threads of a group store their sum": Fault(
        IM2COL,
        "if (active && loop.lane == 0) {",
        "if (active && (loop.lane == 0 || FAULT)) {",
        "race between two writes",
    ),
    "addition without atomics": Fault(
        "cuda/vectorized_access.cuh",
        "  if constexpr (kFloat4) {",
        "  if (FAULT) {\n    for (int i = 0; i < kSize; ++i) to[i] += value[i];\n    return;\n  }\n"
        "  if constexpr (kFloat4) {",
        "race between a read and a write",
    ),
    # In one thread, since several would also race with each other.
    "addition without atomics in one thread": Fault(
        "cuda/vectorized_access.cuh",
        "  constexpr bool kFloat4 =",
        "  if (FAULT && blockIdx.x == 1 && threadIdx.x == 7) {\n"
        "    for (int i = 0; i < kSize; ++i) to[i] = value[i];\n    return;\n  }\n"
        "  constexpr bool kFloat4 =",
        "race between a write and an atomic",
    ),
    "threads without work return before a shuffle": Fault(
        IM2COL,
        "const TapIndex<S, T> tap_index(tile, active ? index : 0);",
        "if (!active && FAULT) return;\n"
        "    const TapIndex<S, T> tap_index(tile, active ? index : 0);",
        "shuffle mask names an exited lane",
    ),
    "a shuffle in a branch": Fault(
        IM2COL,
        "    T sums[4] = {};\n    if (active &&",
        "    T sums[4] = {};\n"
        "    if (FAULT && loop.lane == 0) sums[0] = __shfl_xor_sync(0xffffffff, sums[0], 1);\n"
        "    if (active &&",
        "shuffle not reached by all lanes",
    ),
    "a mask of half the warp": Fault(
        "cuda/roi/roi_bins.cu",
        "0xffffffff",
        "(FAULT ? 0xffffu : 0xffffffffu)",
        "shuffle mask leaves out a lane that takes part",
        pool,
    ),
}


def copy_sources() -> None:
    """Writes the copy; touches only files that change, so that make compiles only those."""
    sources = {p.relative_to(ROOT / "csrc"): p for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    for relative, path in sources.items():
        text = path.read_text()
        for name, fault in FAULTS.items():
            if fault.file != relative.as_posix():
                continue
            assert fault.code in text, f"{fault.file} has no {fault.code!r}"
            selected = f'cuda_emulator::is_selected("{name}")'
            text = text.replace(fault.code, fault.faulty.replace("FAULT", selected))
        copied = OUT / "csrc" / relative
        if not copied.exists() or copied.read_text() != text:
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_text(text)
    for path in list((OUT / "csrc").rglob("*")):
        if path.is_file() and path.relative_to(OUT / "csrc") not in sources:
            path.unlink()


def run() -> dict[str, str]:
    """Returns the message of the error for each fault; "" where there was none."""
    emulator = Emulator(OUT / "emulator.so")
    reports = {}
    for name, fault in {"": None, **FAULTS}.items():
        torch.manual_seed(0)
        emulator.select_fault(name)
        calls = {f.call for f in FAULTS.values()} if fault is None else {fault.call}
        reports[name] = ""
        for call in calls:
            try:
                call()
            except RuntimeError as error:
                reports[name] = str(error).splitlines()[0]
    return reports


if __name__ == "__main__":
    if sys.argv[1] == "copy":
        copy_sources()
    else:
        print(json.dumps(run()))
