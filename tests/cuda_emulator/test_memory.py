# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What the checked build takes for memory that was never written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from dcn_plugin.ops import deform_conv2d
from tests.devices import EMULATOR

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        EMULATOR is None or not EMULATOR.is_checked,
        reason="needs the checked build of the emulator, as DCN_CUDA_EMULATOR",
    ),
]
# What memory.cpp fills new memory with, as 32 bits.
UNINITIALIZED = 0xFFE9FFE9
# Pixels of one value, and vectors of several.
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def convolve(input: Tensor, weight: Tensor) -> Tensor:
    return deform_conv2d(input, input.new_zeros(1, 18, *input.shape[2:]), weight, padding=1)


@LAYOUTS
def test_the_lower_half_of_a_float64_may_look_unwritten(layout: torch.memory_format) -> None:
    """One value in 2**32 does: among the partial sums of a run of all tests that happens."""
    bits = torch.randn(1, 8, 5, 6).double().view(torch.int64)
    input = (bits & ~0xFFFFFFFF | UNINITIALIZED).view(torch.float64).to(memory_format=layout)
    leaves = [input.requires_grad_(), torch.randn(4, 8, 3, 3).double().requires_grad_()]
    results = []
    for output in (convolve(*leaves), conv2d(*leaves, padding=1)):
        results.append([output, *torch.autograd.grad(output.sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_unwritten_values_are_found(dtype: torch.dtype, layout: torch.memory_format) -> None:
    input = torch.empty(1, 8, 5, 6, dtype=dtype).to(memory_format=layout)
    unwritten = input[0, 2:4, 2, 3].clone()
    input.copy_(torch.randn(1, 8, 5, 6))
    input[0, 2:4, 2, 3] = unwritten
    with pytest.raises(RuntimeError, match="read of uninitialised memory"):
        convolve(input, torch.randn(4, 8, 3, 3, dtype=dtype))
