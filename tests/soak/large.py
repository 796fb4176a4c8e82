# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Input gradients of more than 2**31 elements, once, where the memory is free."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dcn_plugin.ops import deform_conv2d, deform_roi_pool
from tests.ops.peak_memory import Peak
from tests.tolerances import relative_error

from .progress import Progress

GIB = 1 << 30
SIDE, CHANNELS = 16400, 8  # 2.15e9 elements
STEP = 8192  # from one output to the next: 3 x 3 of them
CORNER = 16  # rows and columns that are compared at both ends
NEEDED = 7 * GIB  # 4 for the gradient in bfloat16; 5 were measured
DTYPE = torch.bfloat16


def run(progress: Progress, seed: int) -> None:
    """Computes one input gradient of each op, and compares its first and last elements.

    Args:
        progress: of the part.
        seed: of the values.
    """
    for name, check in (("deform_conv2d", _conv), ("deform_roi_pool", _roi)):
        available = _available_memory()
        if available < NEEDED:
            print(
                f"large: not run: {NEEDED / GIB:.0f} GiB of memory are needed, "
                f"{available / GIB:.1f} GiB are available"
            )
            progress.count("skipped")
            continue
        torch.manual_seed(seed)
        peak = Peak("cpu")
        errors = check()
        print(f"large: {name}: {peak.bytes() / GIB:.1f} GiB more at most, errors {errors}")
        if not max(errors) <= 2 * torch.finfo(DTYPE).eps:
            progress.fail(f"{name}: the input gradient differs by {errors} at its ends")
        progress.count(name)


def _available_memory() -> int:
    """Returns the memory that can be allocated without swapping, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = dict(line.split(":") for line in lines)
    return int(sizes["MemAvailable"].split()[0]) << 10


def _input() -> Tensor:
    """Returns an input whose memory is one element: the gradient alone is large."""
    return torch.randn(()).to(DTYPE).expand(1, CHANNELS, SIDE, SIDE).requires_grad_()


def _conv() -> list[float]:
    """Returns the errors of the gradient of a convolution with outputs far apart."""
    input, weight = _input(), torch.randn(4, CHANNELS, 3, 3).to(DTYPE)
    outputs = (SIDE - 3) // STEP + 1
    offset = torch.rand(1, 2 * 9, outputs, outputs)
    output = deform_conv2d(input, offset, weight, stride=STEP)
    grad_output = torch.randn(output.shape).to(DTYPE)
    (gradient,) = torch.autograd.grad(output, input, grad_output)
    errors = []
    for output_index, begin in ((0, 0), (outputs - 1, (outputs - 1) * STEP)):
        size = SIDE - begin if output_index else CORNER
        small = input[:, :, :size, :size].detach().double().requires_grad_()
        here = slice(output_index, output_index + 1)
        value = deform_conv2d(
            small, offset[:, :, here, here].double(), weight.double(), stride=size
        )
        (expected,) = torch.autograd.grad(value, small, grad_output[:, :, here, here].double())
        found = gradient[:, :, begin : begin + size, begin : begin + size]
        errors.append(relative_error(found, expected))
    return errors


def _roi() -> list[float]:
    """Returns the errors of the gradient of RoI pooling with a box in the first and last corner."""
    input, begin = _input(), SIDE - CORNER
    box = torch.tensor([[0, 1.3, 2.1, 11.7, 12.2]], dtype=torch.float64)
    boxes = torch.cat([box, box + torch.tensor([0.0, *[begin] * 4])])
    offset = torch.rand(2, 2, 3, 3, dtype=torch.float64)
    output = deform_roi_pool(input, boxes, offset, 3, sampling_ratio=2)
    grad_output = torch.randn(output.shape).to(DTYPE)
    (gradient,) = torch.autograd.grad(output, input, grad_output)
    errors = []
    for index, first in enumerate((0, begin)):
        small = input[:, :, :CORNER, :CORNER].detach().double().requires_grad_()
        value = deform_roi_pool(small, box, offset[index : index + 1], 3, sampling_ratio=2)
        (expected,) = torch.autograd.grad(value, small, grad_output[index : index + 1].double())
        found = gradient[:, :, first : first + CORNER, first : first + CORNER]
        errors.append(relative_error(found, expected))
    return errors
