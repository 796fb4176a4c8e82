# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI pooling as ATen ops, against the kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dcn_plugin.ops._roi_pool_decomposition import decompose_deform_roi_pool
from tests.ops.roi_cases import BOXES, HALF_PIXEL_BOXES, RoiCase
from tests.tolerances import assert_near

CASES = [
    RoiCase(classes=classes, part=part, group=group, ratio=ratio, boxes=tuple(boxes.values()))
    for classes in (0, 1, 3)
    for part, group in ((None, None), ((2, 3), (3, 2)), ((3, 2), (1, 1)), ((5, 4), (2, 2)))
    for ratio, boxes in ((1, BOXES), (2, BOXES), (3, HALF_PIXEL_BOXES))
]


def both(call: dict[str, Any], case: RoiCase) -> tuple[Tensor, Tensor]:
    """Returns what the decomposition and the kernel compute."""
    ps = case.to_ps(call)
    sizes = [list(ps[name]) for name in ("output_size", "part_size", "group_size")]
    settings = [ps[name] for name in ("spatial_scale", "sampling_ratio", "gamma", "mode")]
    arguments = (ps["input"], ps["boxes"], ps["offset"], *sizes, *settings)
    return decompose_deform_roi_pool(*arguments), torch.ops.dcn_plugin.deform_roi_pool(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_kernel(dtype: torch.dtype) -> None:
    for case in CASES:
        found, expected = both(case.draw(dtype=dtype), case)
        assert found.dtype == dtype and (expected != 0).any()
        assert_near(found, expected, str(case))


@pytest.mark.parametrize("channels_last", [False, True])
def test_has_the_gradients_of_the_kernel(channels_last: bool) -> None:
    case = CASES[-2]
    call = case.draw()
    if channels_last:
        call["input"] = call["input"].to(memory_format=torch.channels_last)
    leaves = [call[name].requires_grad_() for name in ("input", "offset")]
    outputs = both(call, case)
    grad = torch.randn_like(outputs[0])
    found, expected = (torch.autograd.grad(output, leaves, grad) for output in outputs)
    for one, other in zip(found, expected, strict=True):
        assert_near(one, other)


def test_nan_infinite_and_huge_values() -> None:
    case = replace(CASES[-2], boxes=tuple(BOXES.values()))
    call = case.draw()
    call["boxes"][0, 3] = torch.nan
    call["boxes"][1, 2] = torch.inf
    call["boxes"][2, 1:3] = -1e30
    call["offset"][3, 1, 0, 0] = torch.nan
    call["offset"][4, 0, 1, 0] = torch.inf
    call["offset"][5, 0, 1, 0] = -1e30
    found, expected = both(call, case)
    assert expected[0].isnan().all() and (expected[1] == 0).all() and expected[3].isnan().any()
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_no_boxes() -> None:
    case = replace(CASES[-2], boxes=())
    found, expected = both(case.draw(), case)
    assert found.shape == expected.shape


@pytest.mark.parametrize(
    "change, message",
    [({"mode": "bin"}, "got 'bin'"), ({"mode": "msra"}, "got 'msra'"), ({"ratio": 0}, "=0")],
)
def test_rejects_what_it_cannot_do(change: dict[str, Any], message: str) -> None:
    case = replace(CASES[0], **change)
    with pytest.raises(NotImplementedError, match=message):
        both(case.draw(), case)
