# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Indices of more than 31 bits. The emulator does not use memory for what is not accessed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dcn_plugin.ops import deform_conv2d, deform_roi_pool, roi_pool
from tests.cuda_emulator.faults import far_input
from tests.deterministic import deterministic_algorithms
from tests.devices import EMULATOR

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not EMULATOR, reason="such tensors do not fit in the memory of a GPU"),
]
# All threads of a grid of the largest size, 2**16 blocks.
WARPS = 2**16 * 8


@pytest.fixture(params=[False, True], ids=["atomics", "deterministic"])
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    with deterministic_algorithms(request.param):
        yield


def assert_equal_to_near_input(function, far: Tensor, *others: Tensor) -> None:
    """Compares with the same call on a contiguous copy of the input."""
    results = []
    for input in (far, far.contiguous()):
        leaves = [t.detach().requires_grad_() for t in (input, *others)]
        output = function(*leaves)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("deterministic")
def test_convolution_of_a_map_with_far_rows(dtype: torch.dtype) -> None:
    offset, weight = torch.randn(2, 18, 5, 6), torch.randn(4, 8, 3, 3) / 8
    assert_equal_to_near_input(
        lambda *call: deform_conv2d(*call, padding=1),
        far_input(dtype),
        offset.to(dtype),
        weight.to(dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("deterministic")
def test_pooling_of_a_map_with_far_rows(dtype: torch.dtype) -> None:
    boxes = torch.tensor([[0, 1, 1, 4, 4], [1, 0, 1, 5, 4]], dtype=torch.float32)
    offset = torch.randn(2, 2, 3, 3)
    assert_equal_to_near_input(
        lambda input, offset: deform_roi_pool(input, boxes, offset, 3),
        far_input(dtype),
        offset,
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooled_features_of_more_than_2_31_elements(layout: torch.memory_format) -> None:
    """Runs the threads of the first, some middle and the last RoIs.

    Not deterministic: those kernels read what all threads of others have written.
    """
    rois, channels, bins = 5 * WARPS // 64, 1024, 64
    assert rois * channels * bins > 2**31
    input = torch.ones(1, channels, 6, 6, dtype=torch.float16).contiguous(memory_format=layout)
    boxes = torch.tensor([[0.0, 1, 1, 4, 4]]).expand(rois, 5)
    input.requires_grad_()
    EMULATOR.run_few_warps(2)
    try:
        output = roi_pool(input, boxes, 8)
        output.backward(torch.ones(1, dtype=torch.float16).expand_as(output))
    finally:
        EMULATOR.run_few_warps(0)
    assert output[0, :, 0, 0].eq(1).all() and output[-1, :, -1, -1].eq(1).all()
    assert input.grad.isfinite().all()
